"""One test file of the suite, in a tree of its own, and what came of each test."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kflex_repro import build
from kflex_repro.build import redis_source
from kflex_repro.errors import KflexError, Unavailable
from kflex_repro.redis.server import redis_binary
from tests.redis_suite.attacher import Attacher, Count, listening

HOOKS = Path(__file__).with_name("hooks.tcl")
# hooks.tcl goes before the line where the suite begins to run.
_MARK = "# parse arguments\n"
_LINE = re.compile(r"^\[(ok|err|skip|ignore|exception)\]: (.*?)(?: \(\d+ ms\))?$")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
PORTS_EACH = 200
FIRST_PORT = 21111
# A failure of no single test.
WHOLE = "the file as a whole"

# How the suite is run. "served": clients stay in database 0 and no keyspace events are asked for, so that the
# offload may serve; "as is": its own defaults, database 9 and notify-keyspace-events KEA: it all passes.
MODES: dict[str, tuple[str, ...]] = {
    "served": ("--singledb", "--config", "notify-keyspace-events", '""'),
    "as is": (),
}


@dataclass
class Outcome:
    """What one file did: how often each test ended how (names may repeat), the failures' texts, seconds."""

    file: str
    mode: str
    offloaded: bool
    tests: dict[str, collections.Counter[str]] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    count: Count = field(default_factory=Count)
    log: str = ""

    def total(self, what: str) -> int:
        return sum(ends[what] for ends in self.tests.values())

    @property
    def failed(self) -> set[str]:
        return {name for name, ends in self.tests.items() if ends["err"] or ends["exception"]}

    def as_dict(self) -> dict[str, Any]:
        return {
            "seconds": round(self.seconds, 1),
            **{what: self.total(what) for what in ("ok", "err", "exception", "skip", "ignore")},
            "failed": {name: self.details.get(name, "") for name in sorted(self.failed)},
            **self.count.as_dict(),
        }


def parse(text: str, outcome: Outcome) -> None:
    """Reads runtest's output into ``outcome``."""
    name = ""
    for line in _ANSI.sub("", text).splitlines():
        match = _LINE.match(line)
        if match is None:
            if line.startswith("[") or not line.strip():
                name = ""
            elif name:
                outcome.details[name] += f"\n{line}"
            continue
        what, name = match.groups()
        if what == "err":
            name = name.rpartition(" in tests/")[0] or name
        elif what == "exception":
            name = WHOLE
            outcome.details[name] = match.group(2)
        outcome.tests.setdefault(name, collections.Counter())[what] += 1
        if what == "err":
            outcome.details.setdefault(name, "")
        elif what != "exception":
            name = ""


def tclsh() -> str:
    for name in ("tclsh8.6", "tclsh8.5", "tclsh8.7", "tclsh"):
        if found := shutil.which(name):
            return found
    raise Unavailable("tclsh is not installed", "", "apt install tcl")


def free_ports(count: int) -> list[int]:
    """So many base ports for runs at the same time, where nobody else runs the suite."""
    found: list[int] = []
    for base in range(FIRST_PORT, 32000, 2 * PORTS_EACH):
        # The suite's own server listens below the base.
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", base - 32))
            found.append(base)
        if len(found) == count:
            return found
    raise KflexError("no free ports", f"{FIRST_PORT} to 32000", "is the suite running several times?")


def files() -> list[str]:
    """All test files that the suite itself would run."""
    text = (redis_source.ensure() / "tests" / "test_helper.tcl").read_text()
    match = re.search(r"set ::all_tests \{(.*?)\}", text, re.S)
    if match is None:
        raise KflexError("the suite's list of tests is not where it was", "tests/test_helper.tcl")
    return match.group(1).split()


@contextlib.contextmanager
def _tree() -> Any:
    """A copy of the suite with our hooks, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="kflex-suite-") as directory:
        tree = redis_source.tree(Path(directory) / "redis", redis_binary().parent)
        helper = tree / "tests" / "test_helper.tcl"
        text = helper.read_text()
        if text.count(_MARK) != 1:
            raise KflexError("the suite has no place for our hooks", str(helper))
        helper.write_text(text.replace(_MARK, f"source {HOOKS}\n{_MARK}"))
        yield tree


_running: set[subprocess.Popen[str]] = set()
_stopped = threading.Event()


def stop() -> None:
    """Ends what runs now and starts nothing more: the other threads come back soon."""
    _stopped.set()
    for process in list(_running):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen[str], tree: Path) -> None:
    """Ends the suite's processes: its group, and servers that it left (they run in its tree)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if entry.name.isdigit() and (entry / "cwd").readlink().is_relative_to(tree):
                os.kill(int(entry.name), signal.SIGKILL)


def run_file(
    file: str,
    mode: str,
    built: build.Built | None,
    *,
    baseport: int = FIRST_PORT,
    more: tuple[str, ...] = (),
    timeout: float = 600.0,
) -> Outcome:
    """Runs one file, with the offload of ``built`` or plain (None); it is ended after ``timeout`` s."""
    outcome = Outcome(file, mode, built is not None)
    attacher = Attacher(built)
    module = ("--config", "loadmodule", str(built.module)) if built else ()
    with _tree() as tree, listening(attacher) as port:
        began = time.monotonic()
        process = subprocess.Popen(
            [
                *(tclsh(), "tests/test_helper.tcl", "--single", file, "--clients", "1", "--durable"),
                *("--no-latency", "--timeout", str(int(timeout)), "--dont-clean"),
                *("--baseport", str(baseport), "--portcount", str(PORTS_EACH)),
                *MODES[mode],
                *module,
                *more,
            ],
            cwd=tree,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "KFLEX_SUITE_PORT": str(port), "LC_ALL": "C.UTF-8"},
            start_new_session=True,
        )
        _running.add(process)
        try:
            if _stopped.is_set():
                raise KflexError("stopped", file)
            outcome.log, _ = process.communicate(timeout=timeout + 60)
        except subprocess.TimeoutExpired:
            _end(process, tree)
            outcome.log, _ = process.communicate()
        finally:
            _running.discard(process)
            _end(process, tree)
        outcome.seconds = time.monotonic() - began
    outcome.count = attacher.count
    parse(outcome.log, outcome)
    if f"done]: {file}" not in _ANSI.sub("", outcome.log):
        name = WHOLE
        outcome.tests.setdefault(name, collections.Counter())["exception"] += 1
        outcome.details.setdefault(name, outcome.log[-500:])
    return outcome


def dump(outcomes: list[Outcome]) -> str:
    found = [{"file": o.file, "mode": o.mode, "offloaded": o.offloaded, **o.as_dict()} for o in outcomes]
    return json.dumps(found, indent=1)
