"""The smoke tests on the stock kernel, in a VM; all marked ``emulated`` where this host refuses BPF, or is
not root's.

KFLEX_REQUIRE_BPF=1 holds in the guest: what it cannot run fails there, and here with the guest's own words.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kflex_repro.errors import Unavailable
from tests.conftest import refused, unavailable
from tests.vm import smoke


@pytest.mark.skipif(os.environ.get("KFLEX_VM") == "1", reason="runs in a VM already")
def test_what_needs_bpf_passes_on_the_stock_kernel(
    tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    notes: list[str] = []
    try:
        found = smoke.run("stock", tmp_path, everything=bool(refused()), note=notes.append)
    except Unavailable as error:
        unavailable(f"no VM: {error}")
    for line in notes:
        print(line)
    record_property("vm", found.summary)
    if found.problems:
        pytest.fail("\n\n".join((found.summary, *found.problems)), pytrace=False)
