"""What the programs cost the kernel's verifier, which each `offload start` waits for."""

from __future__ import annotations

import pytest

from kflex_repro import build
from kflex_repro.bpf import Object
from kflex_repro.offload import adopt
from kflex_repro.offload.attach import OBJECT

# BPF_COMPLEXITY_LIMIT_INSNS in include/linux/bpf.h: here it gives up.
LIMIT = 1_000_000


@pytest.mark.bpf
@pytest.mark.smoke("bpf")
def test_the_offload_stays_far_from_the_verifiers_limit() -> None:
    """Other verifiers, and other clangs, follow other ways through a program: some room must be left."""
    with Object.open(build.ensure().object(OBJECT)) as obj:
        adopt.prepare(obj)
        obj.load()
        loaded = {name: program for name, program in obj.programs.items() if program.fd >= 0}
        work = {name: program.info.verified_insns for name, program in loaded.items()}
    assert work["kflex_client"] > 0
    assert max(work.values()) < LIMIT // 4, work
