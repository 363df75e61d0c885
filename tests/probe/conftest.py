"""Children of ours that do a known thing when told to, and nothing else."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.bpf.conftest import compile_bpf  # noqa: F401 (a fixture)
from tests.conftest import require, unavailable


@pytest.fixture(autouse=True)
def _root() -> None:
    require("root")


class Child:
    """A process that runs when `go()` is called, and waits again when that returns."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._answer = self._process.stdout.readline

    @property
    def pid(self) -> int:
        return self._process.pid

    def ready(self) -> Child:
        assert self._answer() == "ready\n"
        return self

    def start(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def go(self) -> None:
        self.start()
        assert self._answer() == "done\n"

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def child() -> Iterator[Callable[..., Child]]:
    """child(command...): started, and waiting for its go(); ended with the test."""
    made: list[Child] = []

    def make(*command: str) -> Child:
        made.append(Child(list(command)))
        return made[-1].ready()

    yield make
    for one in made:
        one.end()


PYTHON = """
import os, sys
def work():
{work}
print("ready", flush=True)
for line in sys.stdin:
    work()
    print("done", flush=True)
"""


@pytest.fixture
def python(child: Callable[..., Child]) -> Callable[[str], Child]:
    """python(body of a function): a Python child that runs it at each go()."""

    def make(work: str) -> Child:
        body = "\n".join(f"    {line}" for line in work.strip().splitlines())
        return child(sys.executable, "-S", "-c", PYTHON.format(work=body))

    return make


C_MAIN = r"""
#include <stdio.h>
#define VISIBLE __attribute__((noinline, noclone, visibility("default")))
%s
int main(void)
{
	char line[16];

	puts("ready");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		work();
		puts("done");
		fflush(stdout);
	}
	return 0;
}
"""


@pytest.fixture
def c_program(tmp_path: Path) -> Callable[..., Path]:
    """c_program(source with a work(), more compiler arguments): the compiled program."""

    def make(source: str, *arguments: str) -> Path:
        (tmp_path / "child.c").write_text(C_MAIN % source)
        made = tmp_path / "child"
        command = ["gcc", "-O1", "-Wl,-E", *arguments, str(tmp_path / "child.c"), "-o", str(made), "-pthread"]
        subprocess.run(command, check=True, capture_output=True)
        return made

    return make


class Bpftrace:
    """A bpftrace program that has attached; `counts()` ends it and returns its map ``@``."""

    def __init__(self, program: str) -> None:
        # BEGIN runs before the probes are there. They are attached in order, from one end or the other.
        ends = [f'interval:ms:20 {{ printf("{name}\\n"); }}' for name in ("first", "last")]
        command = ["bpftrace", "-f", "json", "-e", f"{ends[0]} {program} {ends[1]}"]
        # It looks for tracefs in one place: mounted there, in a mount namespace that goes away with it.
        mount = 'mount -t tracefs tracefs /sys/kernel/tracing && exec "$@"'
        self._process = subprocess.Popen(
            ["unshare", "-m", "--propagation", "private", "sh", "-c", mount, "sh", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        waiting = {"first", "last"}
        while waiting:
            line = self._process.stdout.readline()
            assert line, self._process.communicate()
            waiting = {name for name in waiting if f'"{name}' not in line}

    def counts(self) -> dict[str, int]:
        self._process.send_signal(signal.SIGINT)
        out, err = self._process.communicate(timeout=60)
        found = [json.loads(line) for line in out.splitlines() if '"type": "map"' in line]
        assert found, err
        return found[0]["data"]["@"]

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def bpftrace() -> Iterator[Callable[[str], Bpftrace]]:
    """bpftrace(program): attached; ended with the test."""
    if shutil.which("bpftrace") is None:
        unavailable("bpftrace is not installed: nothing to compare with")
    made: list[Bpftrace] = []

    def make(program: str) -> Bpftrace:
        made.append(Bpftrace(program))
        return made[-1]

    yield make
    for one in made:
        one.end()
