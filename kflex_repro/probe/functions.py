"""Calls of a process's functions, counted and on request timed, by uprobes (bpf/functions.bpf.c)."""

from __future__ import annotations

import fnmatch
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kflex_repro import host
from kflex_repro.bpf import Link, Object
from kflex_repro.bpf.libbpf import AttachType
from kflex_repro.bpf.uprobe import Place, attach_all
from kflex_repro.build import objects
from kflex_repro.errors import KflexError
from kflex_repro.probe import elf, histogram
from kflex_repro.probe.process import Process, by_pid, need_host_pids

_DETACHERS = 32

# How many places an attach or detach step dealt with.
Progress = Callable[[int], None]


def _silent(places: int) -> None:
    del places


@dataclass(frozen=True)
class Called:
    """One function's calls; when timed also ``returned``, ``times``, ``self_ns`` (without what it called)."""

    function: elf.Function
    calls: int
    returned: int
    self_ns: int
    times: histogram.Times | None

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        data: dict[str, Any] = {"name": self.function.name, "calls": self.calls}
        if self.function.aliases:
            data["aliases"] = list(self.function.aliases)
        if self.times is not None:
            data |= {"returned": self.returned, **self.times.as_dict(), "self_us": self.self_ns / 1000}
        return data


# --- which functions --------------------------------------------------------------------------------------


def mapped(process: Process) -> list[Path]:
    """The files that the process has mapped as code, its program first, as it names them."""
    try:
        program = str(process.exe.readlink())
        lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    except FileNotFoundError:
        raise KflexError(f"{process} has ended") from None
    except PermissionError:
        raise KflexError(f"not allowed to look at {process}", "/proc", "run as root") from None
    found = {program: None}
    for fields in (line.split(None, 5) for line in lines):
        if len(fields) == 6 and "x" in fields[1] and fields[5].startswith("/"):
            found[fields[5]] = None
    return [Path(name) for name in found]


def binary(process: Process, library: str | None = None) -> elf.Binary:
    """The process's program, or the one mapped library whose file name ``library`` (a pattern) matches.

    KflexError if there are no functions with names in it.
    """
    if library is None:
        return _with_functions(elf.read(process.exe, process.root), str(mapped(process)[0]))
    files = [path for path in mapped(process)[1:] if fnmatch.fnmatch(path.name, f"*{library}*")]
    if len(files) != 1:
        names = ", ".join(path.name for path in (files or mapped(process)[1:]))
        what = f"{len(files)} libraries match {library!r}" if files else f"no library matches {library!r}"
        raise KflexError(what, str(process), f"there are: {names or 'none'}")
    return _with_functions(elf.read(process.root / files[0].relative_to("/"), process.root), str(files[0]))


def _with_functions(found: elf.Binary, shown: str) -> elf.Binary:
    if found.functions:
        return found
    raise KflexError(
        "stripped: no function has a name",
        shown,
        "install its debug symbols (a -dbgsym or -debuginfo package), or run a build that is not stripped",
    )


def select(
    found: elf.Binary, match: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> list[elf.Function]:
    """The functions one of whose names matches a pattern of ``match`` and none of ``exclude``."""

    def matches(function: elf.Function, patterns: Sequence[str]) -> bool:
        names = (function.name, *function.aliases)
        return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)

    chosen = [one for one in found.functions if matches(one, match) and not matches(one, exclude)]
    if not chosen:
        near = _near(found, match)
        raise KflexError(
            f"no function matches {' or '.join(match)}",
            f"{found.path.resolve()}, {len(found.functions)} functions",
            f"did you mean {', '.join(near)}?" if near else "see `kflex-repro trace list functions`",
        )
    return chosen


def _near(found: elf.Binary, match: Sequence[str]) -> list[str]:
    import difflib

    words = [re.sub(r"[*?\[\]]", "", pattern) for pattern in match]
    names = [one.name for one in found.functions]
    return [name for word in words for name in difflib.get_close_matches(word, names, 2)]


# --- the trace --------------------------------------------------------------------------------------------


class FunctionTrace:
    """Counts from its start to its end, as a context manager; ``read()`` at any time between.

    Only ``process`` gets breakpoints, all threads of it; children that it forks are not counted. ``refused``
    are functions that take no probe. ``multi``: one link for many (None: if the kernel can).
    """

    def __init__(
        self,
        process: Process,
        path: Path,
        functions: Sequence[elf.Function],
        *,
        timed: bool = False,
        multi: bool | None = None,
        attached: Progress = _silent,
    ) -> None:
        self.process, self.functions, self.timed = process, tuple(functions), timed
        self.multi = host.fact("uprobe_multi").state == "ok" if multi is None else multi
        self.refused: list[elf.Function] = []
        self._path = path
        self._attached = attached
        self._object: Object | None = None
        self._links: list[Link] = []

    def start(self) -> FunctionTrace:
        """Load and attach; takes a while with thousands of functions, and can be interrupted."""
        need_host_pids()
        built = objects.ensure(only="functions")
        obj = self._object = Object.open(built.object("functions"))
        try:
            entry, leave = ("function_enter" if self.timed else "function_count"), "function_return"
            wanted = (leave, entry) if self.timed else (entry,)
            for name, program in obj.programs.items():
                program.set_autoload(name in wanted)
                if self.multi:
                    program.set_expected_attach_type(AttachType.TRACE_UPROBE_MULTI)
            obj.maps["calls"].set_max_entries(len(self.functions))
            for name in ("times", "threads", "no_calls"):
                obj.maps[name].set_autocreate(self.timed)
            if self.timed:
                obj.maps["times"].set_max_entries(len(self.functions))
            obj.load()
            obj.maps["targets"].update(self.process.pid.to_bytes(4, "little"), bytes(4))
            places = [Place(one.offset, row) for row, one in enumerate(self.functions)]
            # Returns first: a call whose entry was seen is then timed.
            for name in wanted:
                refused = attach_all(
                    obj.programs[name],
                    self._path,
                    places,
                    multi=self.multi,
                    pid=self.process.pid,
                    returning=name == leave,
                    into=self._links,
                    done=self._attached,
                )
                places = [place for place in places if place not in refused]
                self.refused += [self.functions[place.cookie] for place in refused]
        except BaseException:
            self.close()
            raise
        return self

    @property
    def probes(self) -> int:
        """How many links hold the probes: what stop() has to take off."""
        return len(self._links)

    def stop(self, detached: Progress = _silent) -> None:
        """Take all probes off: the counts stay as they are until close()."""
        # One link waits for a grace period of the kernel's; many at once share it.
        with ThreadPoolExecutor(_DETACHERS) as pool:
            while self._links:
                some, self._links[-_DETACHERS:] = self._links[-_DETACHERS:], []
                for done in [pool.submit(link.destroy) for link in some]:
                    done.result()
                    detached(1)

    def close(self) -> None:
        """Take all probes off and give up the counts."""
        self.stop()
        if self._object is not None:
            self._object.close()
            self._object = None

    def __enter__(self) -> FunctionTrace:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self) -> list[Called]:
        """The functions that were called so far: by time of their own when timed, else by calls."""
        obj = self._object
        if obj is None:
            raise KflexError("the trace is closed")
        found = []
        for row, function in enumerate(self.functions):
            raw = obj.maps["calls"].lookup(row.to_bytes(4, "little"))
            assert isinstance(raw, list)
            calls = sum(int.from_bytes(one, "little") for one in raw)
            if calls:
                found.append(
                    Called(function, calls, *(self._times(obj, row) if self.timed else (0, 0, None)))
                )
        return sorted(found, key=lambda one: (-one.self_ns, -one.calls, one.function.name))

    def _times(self, obj: Object, row: int) -> tuple[int, int, histogram.Times]:
        raw = obj.maps["times"].lookup(row.to_bytes(4, "little"))
        assert isinstance(raw, list)
        row_type = obj.btf.struct("function_time")
        per_cpu = [row_type.from_buffer_copy(one) for one in raw]
        shape = histogram.Shape.of(obj.btf.constants())
        times = histogram.added(shape, (one.times for one in per_cpu))
        return sum(one.returned for one in per_cpu), sum(one.self_ns for one in per_cpu), times


# --- what it costs ----------------------------------------------------------------------------------------

_CHILD = """
import ctypes, sys, time
function, calls = ctypes.CDLL(None).abs, range({calls})
for line in sys.stdin:
    began = time.process_time_ns()
    for _ in calls:
        function(1)
    print((time.process_time_ns() - began) / {calls}, flush=True)
"""
_CALLS = 2_000
_ROUNDS = 7


@dataclass(frozen=True)
class Cost:
    """Of one probed call here, in ns: what the probe adds, and (timed) what doing nothing shows as."""

    added_ns: float
    floor_ns: float | None


def measured_cost(timed: bool = False, multi: bool | None = None) -> Cost:
    """What a probe costs: medians of CPU time over rounds of a child of ours that calls the C library.

    Its ``abs`` is called without, and then with the probe that ``FunctionTrace`` would put there. That begins
    with an instruction which the kernel steps; probes at one that it emulates (a push) cost a part of this.
    """
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", _CHILD.format(calls=_CALLS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        # Its first answer says that the library is mapped.
        _rounds(child, 2)
        process = by_pid(child.pid)
        library = next(
            path for path in mapped(process) if re.match(r"libc[.-]|libc\.musl|ld-musl", path.name)
        )
        function = select(elf.read(library), ["abs"])
        before = _rounds(child, _ROUNDS)
        with FunctionTrace(process, library, function, timed=timed, multi=multi) as trace:
            during = _rounds(child, _ROUNDS)
            times = trace.read()[0].times
        return Cost(max(0.0, during - before), times.quantile(0.5) if times else None)
    except StopIteration:
        raise KflexError("the C library was not found in a child of ours", sys.executable) from None
    finally:
        child.kill()
        child.communicate()


def _rounds(child: subprocess.Popen[str], count: int) -> float:
    """Median ns per call over ``count`` rounds of the child."""
    assert child.stdin is not None and child.stdout is not None
    found = []
    for _ in range(count):
        child.stdin.write("\n")
        child.stdin.flush()
        found.append(float(child.stdout.readline()))
    return statistics.median(found)
