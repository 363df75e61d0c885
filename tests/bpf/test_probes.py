"""The probes behind doctor: each either works or says why, and leaves nothing."""

from __future__ import annotations

import subprocess
import time

import pytest

from kflex_repro.bpf import fs, libbpf, probe
from kflex_repro.errors import KflexError

pytestmark = [pytest.mark.bpf, pytest.mark.emulated]

REQUIRED = (probe.mmapable, probe.sockops, probe.sk_msg, probe.tp_btf, probe.iter_tcp)
OPTIONAL = (probe.sk_skb, probe.tcx, probe.fentry, probe.kprobe, probe.arena, probe.uprobe_multi)


def probes_left() -> list[str]:
    root = fs.cgroup2_root()
    groups = [path.name for path in root.glob("kflex-probe-*")] if root else []
    shown = subprocess.run(["bpftool", "prog", "show"], check=True, capture_output=True, text=True).stdout
    return groups + [line for line in shown.splitlines() if "kflex_probe" in line]


@pytest.mark.smoke("bpf")
@pytest.mark.parametrize("run", REQUIRED, ids=lambda run: run.__name__)
def test_what_the_default_job_needs_is_here(run) -> None:
    assert run()


@pytest.mark.parametrize("run", OPTIONAL, ids=lambda run: run.__name__)
def test_the_rest_works_or_says_why(run) -> None:
    try:
        assert run()
    except KflexError as error:
        assert error.what and "\n" not in str(error)


@pytest.mark.smoke("bpf")
def test_probes_leave_nothing() -> None:
    for run in (*REQUIRED, *OPTIONAL):
        try:
            run()
        except KflexError:
            continue
    # The kernel frees a program some time after its last user is gone.
    deadline = time.monotonic() + 30
    while left := probes_left():
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def test_a_missing_tracepoint_is_said() -> None:
    with pytest.raises(KflexError, match="no nonsense_here"):
        probe._btf_id(b"nonsense_here", libbpf.AttachType.TRACE_RAW_TP)
