"""One line of a log into events: JSON of the instrumented libbpf, strace, libbpf's and the kernel's words.

A line that none knows gives nothing. Each line that says something has one of ``TOKENS``.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

from kflex_repro.diagnose.events import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_FIXED_NOREPLACE,
    MAP_PRIVATE,
    MAP_SHARED,
    UNLIMITED,
    Definition,
    Event,
    Fact,
    Failure,
    MapCreate,
    Mmap,
    Unmap,
    map_bytes,
)

TOKENS = tuple(
    b'"event"|bpf|mmap(|mmap resumed|munmap(|alloc|ENOMEM|rlim|Linux |Mem|imit|restricted|'
    b"Max |max locked|virtual|vm.|la57|cgroup|map_count|overcommit|bad_|Bad |Vmalloc|RESOURCE".split(b"|")
)
_CODES: dict[str | None, int] = {name: code for code, name in errno.errorcode.items()}
_WORDS = {os.strerror(code): code for code in errno.errorcode}
# Calls of which strace has shown the first half; of more threads at a time none is remembered.
_UNFINISHED = 1024
_INFINITE = {"unlimited", "RLIM_INFINITY", "RLIM64_INFINITY", "-1"}


class Lines:
    """Turns lines into events. Remembers only the calls that strace shows in two halves."""

    def __init__(self) -> None:
        self._unfinished: dict[str, str] = {}

    def events(self, line: str, number: int) -> list[Event]:
        """The events of one line."""
        if "<unfinished" in line or " resumed>" in line:
            line = _joined(line, self._unfinished)
        if head := _CALL.match(line):
            found = list(_strace(head, line, number))
            if found:
                return found
        for reader in (_json, _libbpf, _kernel, _facts, _plain):
            found = list(reader(line, number))
            if found:
                return found
        return []


def errno_of(text: str) -> int:
    """The errno in ``-12``, ``-ENOMEM`` or ``Cannot allocate memory(-12)``; 0 if there is none."""
    if match := re.search(r"-(\d{1,4})\b", text):
        return int(match.group(1))
    if match := re.search(r"\bE[A-Z0-9]{2,}\b", text):
        return int(getattr(errno, match.group(), 0))
    return next((code for words, code in _WORDS.items() if words in text), 0)


# --- the instrumented libbpf ------------------------------------------------------------------------------


def _int(value: Any, default: int | None = None) -> int | None:
    """A number as JSON or C has it, where it can be one of the kernel's; else ``default``."""
    if isinstance(value, str):
        try:
            value = int(value, 0)
        except ValueError:
            return default
    if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value < 1 << 64:
        return default
    return value


def _size(value: Any) -> int | None:
    size = _int(value)
    return size if size and size > 0 else None


def _json(line: str, number: int) -> Iterable[Event]:
    at = line.find("{")
    if at < 0 or '"event"' not in line:
        return
    try:
        record = json.loads(line[at:])
    except (ValueError, RecursionError):
        return
    if not isinstance(record, dict):
        return
    kind = record.get("event")
    pid = _int(record.get("pid"), 0) or 0
    code = abs(_int(record.get("errno"), 0) or 0)
    if kind == "map_create" and not _FEATURE_PROBE.search(str(record.get("name", ""))):
        entries, value = _int(record.get("max_entries")), _int(record.get("value_size"))
        yield MapCreate(
            name=str(record.get("name", "")),
            errno=code,
            type=_int(record.get("type")),
            type_name=str(record.get("type_name", "")),
            value_size=value,
            entries=entries,
            flags=_int(record.get("flags")),
            bytes=_size(record.get("bytes")),
            pid=pid,
            line=number,
            form="trace",
        )
    elif kind == "mmap":
        address = _int(record.get("address"))
        yield Mmap(
            map=str(record.get("map", "")),
            errno=code,
            length=_size(record.get("length")),
            hint=_int(record.get("hint"), 0) or 0,
            flags=_int(record.get("flags")),
            fd=_int(record.get("fd"), -1) or 0,
            address=address if code == 0 else None,
            pid=pid,
            tid=_int(record.get("tid"), pid) or 0,
            line=number,
            form="trace",
        )
    elif kind == "start":
        program, version = record.get("program", "?"), record.get("libbpf", "?")
        yield Fact("program", str(program), f"traced program {program}, libbpf {version}", number)
        for key in ("rlimit_as", "rlimit_memlock"):
            if (value := _int(record.get(key))) is not None:
                yield Fact(key, value, f"{key} {value}", number)


# --- strace -----------------------------------------------------------------------------------------------

_PREFIX = r"^(?:\[pid\s+(?P<pid>\d+)\]\s+|(?P<pid2>\d+)\s+)?(?:[\d:.]+\s+)?(?:\(\+\s*[\d.]+\)\s+)?"
_CALL = re.compile(
    _PREFIX + r"(?P<call>bpf|mmap2?|munmap|mremap|brk|clone3?|v?fork|prlimit64|[gs]etrlimit|openat?)\("
)
_RESUMED = re.compile(_PREFIX + r"<\.\.\. (?P<call>\w+) resumed>")
_RESULT = re.compile(
    r"=\s+(?P<value>-?\d+|0x[0-9a-f]+|\?)(?:<[^>]*>)?(?:\s+(?P<name>E[A-Z0-9]+))?(?:\s+\(.*)?\s*$"
)
_MMAP = re.compile(
    r"mmap2?\((?P<hint>NULL|0x[0-9a-f]+|\d+), (?P<length>\d+|0x[0-9a-f]+), "
    r"[^,]*, (?P<flags>[^,]+), (?P<fd>-?\d+)"
)
_RLIMIT = re.compile(r"RLIMIT_(?P<which>AS|MEMLOCK)\b.*?\{rlim_cur=(?P<value>[\w*]+)")
# The flags that matter here; strace prints names, or numbers with -X raw.
_MAP_FLAGS = {
    "MAP_SHARED": MAP_SHARED,
    "MAP_PRIVATE": MAP_PRIVATE,
    "MAP_FIXED": MAP_FIXED,
    "MAP_ANONYMOUS": MAP_ANONYMOUS,
    "MAP_FIXED_NOREPLACE": MAP_FIXED_NOREPLACE,
}
# libbpf asks the kernel what it can by trying: these failures mean nothing.
_FEATURE_PROBE = re.compile(r"^(libbpf_|kflex_probe)")


@functools.lru_cache(256)
def _map_flags(text: str) -> int:
    total = 0
    for part in text.split("|"):
        part = part.strip()
        total |= _MAP_FLAGS.get(part, 0) or (int(part, 0) if re.fullmatch(r"0x[0-9a-f]+|\d+", part) else 0)
    return total


def _joined(line: str, unfinished: dict[str, str]) -> str:
    """The whole of a call that strace shows in two halves, once the second is there; else ""."""
    if resumed := _RESUMED.match(line):
        begun = unfinished.pop(resumed.group("pid") or resumed.group("pid2") or "", "")
        return begun + line[resumed.end() :] if begun else ""
    if (head := _CALL.match(line)) and len(unfinished) < _UNFINISHED:
        thread = head.group("pid") or head.group("pid2") or ""
        unfinished[thread] = line.partition("<unfinished")[0].rstrip()
    return ""


def _strace(head: re.Match[str], line: str, number: int) -> Iterable[Event]:
    thread = head.group("pid") or head.group("pid2") or ""
    result = _RESULT.search(line)
    if result is None:
        return
    pid = int(thread or 0)
    code = _CODES.get(result.group("name"), 0)
    call = head.group("call")
    body = line[head.start("call") :]
    if call == "bpf":
        yield from _strace_bpf(body, code, pid, number)
    elif call in ("mmap", "mmap2"):
        if match := _MMAP.match(body):
            value = int(result.group("value"), 0) if code == 0 and result.group("value") != "?" else None
            hint = match.group("hint")
            yield Mmap(
                map="",
                errno=code,
                length=int(match.group("length"), 0),
                hint=0 if hint == "NULL" else int(hint, 0),
                flags=_map_flags(match.group("flags")),
                fd=int(match.group("fd")),
                address=value,
                pid=pid,
                tid=pid,
                line=number,
                form="strace",
            )
    elif call == "munmap":
        if code == 0:
            yield Unmap(pid)
    elif "rlimit" in call or call == "prlimit64":
        if code == 0 and (match := _RLIMIT.search(body)):
            which = "rlimit_" + match.group("which").lower()
            yield Fact(which, _limit(match.group("value")), body.strip()[:200], number)
    elif call in ("open", "openat"):
        if code and "/sys/fs/cgroup" in body:
            yield Failure("open", code, body.strip()[:200], pid=pid, line=number, form="strace")
    elif code == errno.ENOMEM:
        yield Failure(call, code, body.strip()[:200], pid=pid, line=number, form="strace")


def _limit(text: str) -> int:
    if text in _INFINITE:
        return UNLIMITED
    total = 1
    for factor in text.split("*"):
        total *= int(factor) if factor.isdigit() else 1
    return total


def _strace_bpf(body: str, code: int, pid: int, number: int) -> Iterable[Event]:
    command = re.match(r"bpf\((\w+)", body)
    if command is None:
        return
    if command.group(1) != "BPF_MAP_CREATE":
        if code in (errno.EPERM, errno.EACCES, errno.ENOMEM, errno.EBADF) and not re.search(
            r'(prog_name|map_name)="libbpf_', body
        ):
            yield Failure(f"bpf({command.group(1)})", code, body[:200], pid=pid, line=number, form="strace")
        return

    def field(name: str) -> str:
        match = re.search(rf"\b{name}=(\"[^\"]*\"|0x[0-9a-f]+|\w+)", body)
        return match.group(1).strip('"') if match else ""

    kind = field("map_type")
    entries, value = _int(field("max_entries")), _int(field("value_size"))
    name = field("map_name")
    if _FEATURE_PROBE.search(name):
        return
    number_of = _int(kind)
    yield MapCreate(
        name=name,
        errno=code,
        type=number_of,
        type_name=kind.removeprefix("BPF_MAP_TYPE_").lower() if number_of is None else "",
        value_size=value,
        entries=entries,
        bytes=map_bytes(entries, value) if entries is not None and value is not None else None,
        pid=pid,
        line=number,
        form="strace",
    )


# --- libbpf's own words -----------------------------------------------------------------------------------

_Make = Callable[[re.Match[str], int], Event]


def _created(match: re.Match[str], number: int) -> Event:
    return MapCreate(name=match.group(1), errno=errno_of(match.group(2)), line=number, form="libbpf")


def _not_mapped(flags: int) -> _Make:
    def make(match: re.Match[str], number: int) -> Event:
        code = errno_of(match.group(2))
        return Mmap(map=match.group(1), errno=code, flags=flags, line=number, form="libbpf")

    return make


def _failed(call: str) -> _Make:
    def make(match: re.Match[str], number: int) -> Event:
        return Failure(call, errno_of(match.group(1)), match.string.strip()[:200], line=number, form="libbpf")

    return make


def _size_word(text: str) -> int:
    amount, _, unit = text.partition(" ")
    return int(float(amount) * {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20}.get(unit, 1))


_LIBBPF: tuple[tuple[re.Pattern[str], _Make], ...] = (
    # The artifact's libbpf alone says this, after a search with these flags; the second is stock libbpf's.
    (re.compile(r"failed to mmap heap map '([^']+)':? (.+)"), _not_mapped(MAP_SHARED | MAP_FIXED_NOREPLACE)),
    (re.compile(r"map '([^']+)': failed to mmap(?: \w+)?: (.+)"), _not_mapped(MAP_SHARED)),
    (re.compile(r"map '([^']+)': failed to create: (.+)"), _created),
    (re.compile(r"Error in bpf_create_map(?:_xattr)?\(([^)]*)\): ?(.+?)\. Retrying"), _created),
    (
        re.compile(
            r"map '([^']+)': found (type|key_size|value_size|max_entries|map_flags) = (0x[0-9a-f]+|\d+)"
        ),
        lambda match, _: Definition(match.group(1), match.group(2), int(match.group(3), 0)),
    ),
    (
        re.compile(r"try raising 'ulimit -l'\? current value: ([\d.]+ \w+)"),
        lambda match, number: Fact(
            "rlimit_memlock", _size_word(match.group(1)), match.group().strip(), number
        ),
    ),
    (re.compile(r"failed to attach to cgroup[^:]*: (.+)"), _failed("attach to cgroup")),
    (re.compile(r"[Pp]rog(?:ram)? .*load failed: (.+)"), _failed("bpf(BPF_PROG_LOAD)")),
    (
        re.compile(r"(?:failed to load program|load bpf program failed)[^:]*: (.+)"),
        _failed("bpf(BPF_PROG_LOAD)"),
    ),
    (
        re.compile(r"failed to load (?:object|BPF skeleton) '([^']+)'"),
        lambda match, number: Fact("object", match.group(1), match.group(), number),
    ),
)


def _libbpf(line: str, number: int) -> Iterable[Event]:
    for pattern, make in _LIBBPF:
        if match := pattern.search(line):
            event = make(match, number)
            if getattr(event, "errno", 1):
                yield event
            return


# --- the kernel's words, and what people paste beside a log -------------------------------------------------


def _vmalloc(match: re.Match[str], number: int) -> Event:
    return Failure(
        "vmalloc",
        errno.ENOMEM,
        match.string.strip()[:200],
        size=int(match.group(1)),
        line=number,
        form="kernel",
    )


def _oom(match: re.Match[str], number: int) -> Event:
    return Failure("oom", errno.ENOMEM, match.string.strip()[:200], line=number, form="kernel")


def _memcg_oom(match: re.Match[str], number: int) -> Event:
    return Failure("memcg-oom", errno.ENOMEM, match.string.strip()[:200], line=number, form="kernel")


_KERNEL: tuple[tuple[re.Pattern[str], _Make], ...] = (
    (re.compile(r"vmalloc error: size (\d+)"), _vmalloc),
    (re.compile(r"vmalloc: allocation failure:? (?:allocated \d+ of )?(\d+) bytes"), _vmalloc),
    (re.compile(r"vmap allocation for size (\d+) failed"), _vmalloc),
    (re.compile(r"Memory cgroup out of memory|CONSTRAINT_MEMCG"), _memcg_oom),
    (re.compile(r"Out of memory: Kill"), _oom),
    (
        re.compile(r"Lockdown: .*\bbpf\b.*restricted"),
        lambda match, number: Fact("lockdown", "confidentiality", match.group().strip()[:200], number),
    ),
)


def _kernel(line: str, number: int) -> Iterable[Event]:
    for pattern, make in _KERNEL:
        if match := pattern.search(line):
            yield make(match, number)
            return


def _bytes_fact(key: str, scale: int) -> _Make:
    def make(match: re.Match[str], number: int) -> Event:
        text = match.group(1)
        value = UNLIMITED if text in _INFINITE else int(text) * scale
        return Fact(key, value, match.group().strip()[:200], number)

    return make


def _text_fact(key: str) -> _Make:
    return lambda match, number: Fact(key, match.group(1), match.group().strip()[:200], number)


def _va_fact(match: re.Match[str], number: int) -> Event:
    # Half of the address space is the kernel's.
    return Fact("va_bits", int(match.group(1)) - 1, match.group().strip()[:200], number)


_FACTS: tuple[tuple[re.Pattern[str], _Make], ...] = (
    (re.compile(r"\bLinux version (\d+\.\d+\S*)"), _text_fact("kernel")),
    (re.compile(r"^Linux \S+ (\d+\.\d+\S*) "), _text_fact("kernel")),
    (re.compile(r"\bMemory: \d+K/(\d+)K available"), _bytes_fact("ram_total", 1024)),
    (re.compile(r"^MemTotal:\s+(\d+) kB"), _bytes_fact("ram_total", 1024)),
    (re.compile(r"^MemAvailable:\s+(\d+) kB"), _bytes_fact("ram_available", 1024)),
    (re.compile(r"^CommitLimit:\s+(\d+) kB"), _bytes_fact("commit_limit", 1024)),
    (re.compile(r"^Mem:\s+(\d{7,})\s+\d+"), _bytes_fact("ram_total", 1)),
    (re.compile(r"^VmallocTotal:\s+(\d+) kB"), _bytes_fact("vmalloc_total", 1024)),
    (re.compile(r"\bbits physical, (48|57) bits virtual"), _va_fact),
    (re.compile(r"\bvm\.overcommit_memory\s*=\s*(\d)"), _bytes_fact("overcommit", 1)),
    (re.compile(r"\bvm\.max_map_count\s*=\s*(\d+)"), _bytes_fact("max_map_count", 1)),
    (re.compile(r"^virtual memory\s+\(kbytes, -v\)\s+(\d+|unlimited)"), _bytes_fact("rlimit_as", 1024)),
    (
        re.compile(r"^max locked memory\s+\(kbytes, -l\)\s+(\d+|unlimited)"),
        _bytes_fact("rlimit_memlock", 1024),
    ),
    (re.compile(r"^Max address space\s+(\d+|unlimited)"), _bytes_fact("rlimit_as", 1)),
    (re.compile(r"^Max locked memory\s+(\d+|unlimited)"), _bytes_fact("rlimit_memlock", 1)),
)


def _facts(line: str, number: int) -> Iterable[Event]:
    for pattern, make in _FACTS:
        if match := pattern.search(line):
            yield make(match, number)
            return


# --- a program's own words --------------------------------------------------------------------------------

_OUT_OF_HEAP = re.compile(r"bad_optional_access|Bad StatusOr access|RESOURCE_EXHAUSTED", re.I)
_CGROUP = re.compile(r"[Ff]ailed to (?:open|attach).{0,60}\bcgroup")
# A heap's failed call as people log it: "mmap of heap (4294967296 bytes) failed: Cannot allocate memory".
_HEAP = re.compile(r"\bheap\b", re.I)
_HEAP_CALL = re.compile(
    r"\b(?P<map>mmap)|\b(?P<create>map_create|create_map|bpf_map_create|creat\w+)\b", re.I
)
_SIZE = re.compile(r"\b(?:(?P<bytes>\d{9,16})|(?P<gb>\d{1,5}) ?Gi?B?)\b")


def _heap_call(line: str, number: int) -> Event | None:
    """A map creation or mmap of a heap that got ENOMEM, in words of nobody's in particular."""
    call = _HEAP_CALL.search(line)
    if call is None or not _HEAP.search(line):
        return None
    size = _SIZE.search(line)
    length = (int(size["bytes"]) if size["bytes"] else int(size["gb"]) << 30) if size else None
    if call["map"]:
        flags = MAP_SHARED | MAP_FIXED_NOREPLACE
        return Mmap("heap", errno.ENOMEM, length=length, flags=flags, line=number, form="libbpf")
    return MapCreate(name="heap", errno=errno.ENOMEM, bytes=length, line=number, form="text")


def _plain(line: str, number: int) -> Iterable[Event]:
    words = line.strip()[:200]
    if _OUT_OF_HEAP.search(line):
        yield Failure("out-of-heap", 0, words, line=number)
    elif _CGROUP.search(line):
        yield Failure("attach to cgroup", errno_of(line), words, line=number)
    elif re.search(r"\bENOMEM\b|" + re.escape(os.strerror(errno.ENOMEM)), line):
        yield _heap_call(line, number) or Failure("message", errno.ENOMEM, words, line=number)
