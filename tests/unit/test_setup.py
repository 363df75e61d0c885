"""The set-up script and the Makefile, as far as they can be tried without changing the machine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]


def run(*command: str, nobody: bool = False) -> subprocess.CompletedProcess[str]:
    drop = (
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        if nobody and os.geteuid() == 0
        else []
    )
    # A make above us must not speak through its environment.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        [*drop, *command],
        check=False,
        capture_output=True,
        text=True,
        cwd=TOP,
        stdin=subprocess.DEVNULL,
        env=env,
    )


@pytest.mark.parametrize("goal", ["soak", "test-redis-suite"])
def test_without_root_make_says_one_line(goal: str) -> None:
    done = run("make", goal, nobody=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and f"make {goal} needs root: sudo make {goal}" in done.stderr


@pytest.mark.parametrize(
    ("goal", "runs"),
    [
        ("bench", "bench redis --quick"),
        ("test", "pytest --quick"),
        ("test-vm", "tests.vm 6.1 ./linux --quick"),
    ],
)
def test_what_can_run_in_a_vm_does_not_ask_for_root_before_it_is_needed(goal: str, runs: str) -> None:
    done = run("make", "-n", goal, "ARGS=--quick", "KERNELS=6.1 ./linux", nobody=True)
    assert done.returncode == 0, done.stderr
    assert "scripts/setup" in done.stdout and runs in done.stdout
    # Objects for this host's kernel, which may have no BTF, are not built for a VM's.
    assert "kflex-repro build" not in done.stdout


def test_dry_run_changes_nothing() -> None:
    stamps = sorted((TOP / ".make").glob("*"))
    done = run("scripts/setup", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert sorted((TOP / ".make").glob("*")) == stamps


def test_what_the_tests_build_with_is_installed_for_them_only() -> None:
    assert run("scripts/setup", "--tests", "--dry-run").returncode == 0
    recipes = {goal: run("make", "-n", goal).stdout for goal in ("test", "soak", "bench")}
    if os.geteuid() == 0:
        assert {goal for goal, text in recipes.items() if "scripts/setup --tests" in text} == {"test", "soak"}


def test_bad_arguments_are_refused() -> None:
    done = run("scripts/setup", "--nonsense")
    assert done.returncode == 2 and done.stderr.startswith("usage: ")


def test_an_interpreter_that_is_too_old_is_passed_over(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(
        [TOP / "scripts" / "setup", "--dry-run"],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": str(old)},
    )
    assert done.returncode == 0 and str(old) not in done.stdout


def test_what_ci_runs_is_executable() -> None:
    assert os.access(TOP / ".ci" / "run", os.X_OK) and os.access(TOP / "scripts" / "setup", os.X_OK)
