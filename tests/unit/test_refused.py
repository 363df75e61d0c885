"""A host that refuses BPF, or is not root's: its tests are skipped at once, and the run says so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import unavailable

TOP = Path(__file__).resolve().parents[2]
LOST = "-bpf,-perfmon,-sys_admin"


def refused(*files: str, **env: str) -> subprocess.CompletedProcess[str]:
    """pytest without the capabilities that BPF needs."""
    prefix: list[str] = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            unavailable("no setpriv")
        prefix = ["setpriv", f"--bounding-set={LOST}", f"--inh-caps={LOST}"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files]
    clean = {name: value for name, value in os.environ.items() if name != "KFLEX_REQUIRE_BPF"}
    return subprocess.run(
        [*prefix, *command],
        check=False,
        cwd=TOP,
        env={**clean, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module", autouse=True)
def _plain_run_refuses_nothing() -> None:
    if os.environ.get("KFLEX_TEST_SERVER") == "plain":
        pytest.skip("the tests against plain Redis need no BPF")


def test_they_are_skipped_and_it_is_said() -> None:
    done = refused("tests/bpf/test_probes.py", "tests/redis/test_offload_order.py")
    assert done.returncode == 0, done.stdout
    (said,) = (line for line in done.stdout.splitlines() if "many of them run in a VM" in line)
    assert "BPF (without CAP_SYS_ADMIN, CAP_PERFMON, CAP_BPF" in said or os.geteuid() != 0
    assert "passed" not in done.stdout and "error" not in done.stdout.splitlines()[-1]
    skipped = int(done.stdout.splitlines()[-1].split(" skipped")[0].split()[-1])
    assert f"{skipped} tests were skipped, as BPF or root is not to be had here" in done.stdout
    assert "and none ran in a VM" in done.stdout


def test_they_fail_where_bpf_must_be_there() -> None:
    done = refused("tests/bpf/test_probes.py", KFLEX_REQUIRE_BPF="1")
    assert done.returncode == 1
    assert "KFLEX_REQUIRE_BPF=1, but:" in done.stdout and "passed" not in done.stdout
