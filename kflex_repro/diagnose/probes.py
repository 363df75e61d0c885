"""This machine, found out by trying: what its limits are, and whether they are consulted at all.

``here()`` are facts with numbers. ``mmap_tries()`` and ``create_tries()`` do what failed once more, each time
with one thing changed, and give the sentences that rule a suspect out (or in).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kflex_repro import host, memory
from kflex_repro.bpf import btf, fs
from kflex_repro.build.objects import KERNEL_BTF
from kflex_repro.diagnose import attempt, trace
from kflex_repro.diagnose.events import UNLIMITED, Search, errno_name, size_text
from kflex_repro.errors import KflexError
from kflex_repro.heap import search

Origin = Literal["log", "here", "assumed"]

# BPF_MAP_TYPE_HEAP in the artifact's UAPI: ARENA + 1 there. The number means nothing on another kernel.
ARTIFACT_HEAP_TYPE = 34
HEAP_TYPE_NAME = "BPF_MAP_TYPE_HEAP"
_V1_UNLIMITED = 1 << 62
_TRY_TIMEOUT_S = 60
# Beyond it no machine has the addresses.
LARGEST_TRY = 1 << 56
_MOST_TRIES = 1 << 16


@dataclass(frozen=True)
class Known:
    """A fact's value and where it is from: the log, this machine, or this machine for want of better."""

    value: int | str
    origin: Origin

    @property
    def number(self) -> int:
        """The value as a number."""
        return int(self.value)

    def label(self) -> str:
        """Where it is from, in words."""
        return {"log": "from the log", "here": "this machine", "assumed": "assumed from this machine"}[
            self.origin
        ]


@dataclass(frozen=True)
class Ruled:
    """A suspect: ruled ``out``, ``in``, or ``unknown``; ``how`` says what was tried and the numbers."""

    id: str
    title: str
    state: Literal["out", "in", "unknown"]
    how: str


# --- facts ------------------------------------------------------------------------------------------------


def _of_files() -> Iterator[tuple[str, int | str]]:
    # The reader that takes these facts from a pasted log takes them from the files themselves.
    for path in ("/proc/meminfo", "/proc/self/limits"):
        with contextlib.suppress(OSError), Path(path).open("rb") as stream:
            for fact in trace.read(stream).facts.values():
                yield fact.key, fact.value
    for name in ("overcommit_memory", "max_map_count", "swappiness"):
        with contextlib.suppress(OSError, ValueError):
            yield name.removesuffix("_memory"), int(Path(f"/proc/sys/vm/{name}").read_text())


@functools.cache
def here() -> Mapping[str, int | str]:
    """Facts of this machine, by the keys that a log's facts have."""
    facts: dict[str, int | str] = dict(_of_files())
    facts["kernel"] = platform.release()
    facts["arch"] = platform.machine()
    facts["va_bits"] = memory.va_bits()
    limit = memory_limit()
    if limit is not None:
        facts["memory_limit"], facts["memory_limit_path"] = limit[0], str(limit[1])
    else:
        facts["memory_limit"] = UNLIMITED
    root = fs.cgroup2_root()
    facts["cgroup2_root"] = str(root) if root else ""
    lockdown, capabilities = host.fact("lockdown"), host.fact("capabilities")
    facts["lockdown"] = lockdown.value
    facts["lacking_capabilities"] = capabilities.value.removeprefix("without ") if capabilities.fix else ""
    return facts


def limits_of(pid: int) -> dict[str, int | str]:
    """RLIMIT_AS and RLIMIT_MEMLOCK of a process; of one that ended too, as long as nobody waited for it."""
    try:
        with Path(f"/proc/{pid}/limits").open("rb") as stream:
            return {fact.key: fact.value for fact in trace.read(stream).facts.values()}
    except OSError:
        return {}


def memory_limit(pid: int | str = "self") -> tuple[int, Path] | None:
    """The tightest memory limit of a process's cgroups (v1 or v2, ancestors too), and its file."""
    found: list[tuple[int, Path]] = []
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = fs.cgroup2_root(), "memory.max"
        elif "memory" in controllers.split(","):
            root = next((point for point in fs.mounts("cgroup") if point.name == "memory"), None)
            name = "memory.limit_in_bytes"
        else:
            continue
        if root is None:
            continue
        at = root / path.lstrip("/")
        for directory in (at, *at.parents):
            with contextlib.suppress(OSError, ValueError):
                value = int((directory / name).read_text())
                if value < _V1_UNLIMITED:
                    found.append((value, directory / name))
            if directory == root:
                break
    return min(found, default=None)


# --- the map type -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeapType:
    """What the kernel's BTF calls ``number``, whether it knows the heap by name, what bpf() said to it."""

    known: bool
    number: int
    meaning: str
    created: int | None

    def sentence(self) -> str:
        """What was found, in words."""
        if self.known:
            text = f"the kernel's BTF has {HEAP_TYPE_NAME} = {self.number}"
        elif self.meaning:
            text = (
                f"the kernel's BTF has no {HEAP_TYPE_NAME}, and the artifact's number for it, {self.number}, "
                f"is {self.meaning} here"
            )
        else:
            text = f"the kernel's BTF has no {HEAP_TYPE_NAME}, and nothing with its number {self.number}"
        if self.created is None:
            return text + "; bpf() not tried: needs root"
        result = errno_name(self.created) if self.created else "a map"
        return text + f"; bpf(BPF_MAP_CREATE) of that type with one page gives {result}"


@functools.cache
def map_types() -> dict[int, str]:
    """The kernel's own names of its map types, by number; empty without BTF."""
    try:
        names = btf.load(KERNEL_BTF).enum("bpf_map_type")
    except KflexError:
        return {}
    return {value: name for name, value in names.items() if not name.startswith("__")}


@functools.cache
def heap_type() -> HeapType | None:
    """Whether this kernel has the artifact's map type; None where BTF cannot be read."""
    types = map_types()
    if not types:
        return None
    number = next((n for n, name in types.items() if name == HEAP_TYPE_NAME), ARTIFACT_HEAP_TYPE)
    created = attempt.map_create(number, 4, 4096, 1, 1 << 10) if host.is_root() else None
    known = types.get(number) == HEAP_TYPE_NAME
    return HeapType(known, number, "" if known else types.get(number, ""), created)


# --- trying again -----------------------------------------------------------------------------------------


def attempts(specs: list[dict[str, object]]) -> list[int]:
    """The errno of each attempt (see attempt.py), in one process of their own; empty if it could not run."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", attempt.__file__],
            input=json.dumps(specs),
            capture_output=True,
            text=True,
            timeout=_TRY_TIMEOUT_S,
            check=True,
        )
        return [int(code) for code in json.loads(done.stdout)]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def _said(code: int) -> str:
    return "works" if code == 0 else f"gives {errno_name(code)}"


def _sysctl(name: str) -> str:
    value = here().get(name, "?")
    return "unlimited" if value == UNLIMITED else str(value)


def _limit(name: str) -> str:
    value = here().get(name, "?")
    return "unlimited" if value == UNLIMITED else size_text(int(value)) if isinstance(value, int) else value


def same_search(event: Search, size: int) -> str:
    """What the same tries come to here, with real mmaps of an empty file; "" where none can be made.

    Of a search that the log has no addresses of, the tries are the artifact's.
    """
    if not 0 < size <= LARGEST_TRY or size & (size - 1) or event.tries > _MOST_TRIES:
        return ""
    plan = search.artifact(size)
    if event.tries:
        step = abs(event.step) or size
        plan = search.Search(event.first, step, event.tries, size, size, event.step <= 0)
    outcome = search.for_real(plan)
    if outcome.address is not None:
        return f"here the same search succeeds, at try {outcome.attempt}, {outcome.address:#x}"
    sysctls = ", ".join(f"{name} = {_sysctl(name)}" for name in ("overcommit", "max_map_count", "swappiness"))
    return (
        f"here the same {outcome.tried} mmaps of an empty file give {errno_name(outcome.errno)} too, with "
        f"{sysctls}, RLIMIT_AS {_limit('rlimit_as')}, RLIMIT_MEMLOCK {_limit('rlimit_memlock')}"
    )


@functools.cache
def mmap_tries(length: int, above: bool) -> tuple[Ruled, ...]:
    """Whether limits that people raise have a say in mapping ``length`` bytes of a map, each tried here.

    ``above``: all that was asked for lies above user space.
    """
    ram = int(here()["ram_total"])
    # More than RAM and swap, less than the address space holds anywhere.
    beyond = min(max(length, 4 * ram), search.task_size(int(here()["va_bits"])) // 4)
    codes = attempts(
        [
            {"call": "mmap", "length": length},
            {"call": "mmap", "length": beyond},
            {"call": "mmap", "length": length, "limits": {"MEMLOCK": 0}},
            {"call": "mmap", "length": length, "limits": {"AS": length // 2}},
        ]
    )
    if len(codes) != 4:
        return ()
    plain, large, unlocked, limited = codes
    size = size_text(length)
    anywhere = f"here a shared mapping of {size} at an address left to the kernel {_said(plain)}"
    count = len(search.mappings())
    unlimited = here().get("rlimit_as") == UNLIMITED
    state: Literal["out", "unknown"] = "out" if plain == 0 else "unknown"
    return (
        Ruled(
            "max-map-count",
            "vm.max_map_count",
            state,
            f"it limits how many mappings a process has (here {count} of {_sysctl('max_map_count')}), not "
            f"their size or place; failed tries leave none behind. H{anywhere[1:]}",
        ),
        Ruled(
            "overcommit",
            "vm.overcommit_memory",
            "out" if large == 0 else "unknown",
            "only private writable memory is counted; a map is mapped shared. Here, with overcommit_memory "
            f"= {_sysctl('overcommit')} and {size_text(ram)} of RAM, a shared mapping of {size_text(beyond)} "
            f"{_said(large)}",
        ),
        Ruled(
            "swappiness",
            "vm.swappiness",
            state,
            "it weighs which pages to reclaim; mmap of a map takes no page: they are all there since the "
            f"map was made, as kernel memory, never swapped. H{anywhere[1:]} without touching a page",
        ),
        Ruled(
            "rlimit-memlock",
            "ulimit -l (RLIMIT_MEMLOCK)",
            "out" if unlocked == 0 else "unknown",
            "nothing is locked by this mmap: here, with RLIMIT_MEMLOCK = 0, the same mapping "
            f"{_said(unlocked)}",
        ),
        Ruled(
            "rlimit-as",
            "ulimit -v (RLIMIT_AS)",
            "out" if above or (unlimited and plain == 0) else "unknown",
            "the kernel looks at the address before the limit: above user space it is ENOMEM under any"
            if above
            else f"it does limit mmap (here, under a limit of half the size, it {_said(limited)}), but it is "
            f"{_limit('rlimit_as')} here, and without it {anywhere.removeprefix('here ')}",
        ),
    )


@functools.cache
def create_tries(size: int) -> tuple[Ruled, ...]:
    """Whether those limits have a say in creating a map of ``size`` bytes, each tried here."""
    small = 16 << 20
    ram = int(here()["ram_total"])
    specs: list[dict[str, object]] = [
        {"call": "map_create", "length": small, "limits": {"MEMLOCK": 0}},
        {"call": "map_create", "length": small, "limits": {"AS": small // 4}},
    ]
    # The kernel refuses at once what exceeds all of RAM; anything smaller would really be allocated.
    if size > ram:
        specs.insert(0, {"call": "map_create", "length": size})
    codes = attempts(specs) if host.is_root() else []
    tried = len(codes) == len(specs) and not any(map(is_permission, codes))
    same = ""
    if tried and size > ram:
        same = f" Here an array map of {size_text(size)} {_said(codes[0])}, one of 16 MiB {_said(codes[-1])}."
    memlock, address = (codes[-2], codes[-1]) if tried else (0, 0)

    def how(code: int, limit: str) -> str:
        if not tried:
            return "not tried: bpf() is not permitted to us"
        return f"here a map of 16 MiB under {limit} {_said(code)}"

    return (
        Ruled(
            "max-map-count",
            "vm.max_map_count",
            "out",
            "it limits the mappings of a process; bpf(BPF_MAP_CREATE) makes none." + same,
        ),
        Ruled(
            "overcommit",
            "vm.overcommit_memory",
            "out",
            "it decides about user memory that may never be touched; the heap is kernel memory, really "
            f"allocated at once, and was asked for with overcommit_memory = {_sysctl('overcommit')} here."
            + same,
        ),
        Ruled(
            "swappiness",
            "vm.swappiness",
            "out",
            "it weighs which pages to reclaim; no reclaim makes room for more than there is, and kernel "
            "memory is never swapped." + same,
        ),
        Ruled(
            "rlimit-memlock",
            "ulimit -l (RLIMIT_MEMLOCK)",
            "out" if tried and memlock == 0 else "unknown",
            f"since kernel 5.11 maps are not charged to it: {how(memlock, 'RLIMIT_MEMLOCK = 0')}",
        ),
        Ruled(
            "rlimit-as",
            "ulimit -v (RLIMIT_AS)",
            "out" if tried and address == 0 else "unknown",
            f"it limits the process's address space, not the kernel's: {how(address, 'RLIMIT_AS + 4 MiB')}",
        ),
    )


def is_permission(code: int) -> bool:
    """EPERM or EACCES."""
    return code in (errno.EPERM, errno.EACCES)
