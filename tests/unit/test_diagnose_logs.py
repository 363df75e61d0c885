"""Readers and causes, on logs as people have them: mixed, cut off, noisy, huge, and of other failures."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kflex_repro.diagnose import diagnosis, trace
from kflex_repro.diagnose.case import Where
from kflex_repro.diagnose.events import MapCreate, Search
from kflex_repro.diagnose.report import Diagnosis
from kflex_repro.heap.model import Heap

GIB = 1 << 30
# What a log of another machine may have pasted beside it.
BIG_MACHINE = "MemTotal:       528280000 kB\nMemAvailable:   520000000 kB\n"
FOUR_LEVELS = "address sizes\t: 46 bits physical, 48 bits virtual\n"
FIVE_LEVELS = "address sizes\t: 52 bits physical, 57 bits virtual\n"


def read(text: str | bytes) -> trace.Log:
    return trace.read(io.BytesIO(text.encode() if isinstance(text, str) else text))


def judged(text: str | bytes, *heaps: Heap, where: Where = "other") -> Diagnosis:
    return diagnosis.of_log(read(text), where, heaps)


def ids(text: str | bytes, *heaps: Heap) -> list[str]:
    return [cause.id for cause in judged(text, *heaps).causes]


def create_line(entries: int, code: str, type: str = "BPF_MAP_TYPE_ARRAY", name: str = "heap") -> str:
    return (
        f"4711  bpf(BPF_MAP_CREATE, {{map_type={type}, key_size=4, value_size=4096, max_entries={entries}, "
        f'map_flags=BPF_F_MMAPABLE, inner_map_fd=0, map_name="{name}"}}, 72) = {code}\n'
    )


def search_lines(size: int, tries: int = 1024, result: str = "-1 ENOMEM (Cannot allocate memory)") -> str:
    start = -(-(1 << 48) // size) * size
    flags = "PROT_READ|PROT_WRITE, MAP_SHARED|MAP_FIXED_NOREPLACE, 3, 0"
    return "".join(f"4711  mmap({start - n * size:#x}, {size}, {flags}) = {result}\n" for n in range(tries))


ENOMEM = "-1 ENOMEM (Cannot allocate memory)"


# --- reading ----------------------------------------------------------------------------------------------


def test_a_search_of_any_length_is_one_event() -> None:
    log = read("execve(...) = 0\n" + search_lines(4 * GIB))
    (search,) = log.searches
    assert (search.first, search.last) == (1 << 48, (1 << 48) - 1023 * 4 * GIB)
    assert (search.tries, search.step, search.errno, search.line) == (1024, -4 * GIB, errno.ENOMEM, 2)


def test_a_search_that_succeeds_in_the_end_is_no_failure() -> None:
    log = read(search_lines(256 * GIB, 514) + search_lines(256 * GIB, 1, "0x7f8000000000"))
    assert not log.failed
    # The second search starts anew; the first one's failures were made good by it.
    assert log.recovered == 1


def test_calls_of_two_threads_that_interleave_are_put_together() -> None:
    placed = "MAP_SHARED|MAP_FIXED_NOREPLACE"
    halves = (
        f"[pid 7] mmap(0x1000000000000, {4 * GIB}, PROT_READ, {placed}, 3, 0 <unfinished ...>\n"
        "[pid 8] mmap(NULL, 4096, PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x7f0000000000\n"
        f"[pid 7] <... mmap resumed>) = {ENOMEM}\n"
        f"[pid 7] mmap(0xffff00000000, {4 * GIB}, PROT_READ, {placed}, 3, 0) = {ENOMEM}\n"
    )
    (search,) = read(halves).searches
    assert (search.pid, search.tries, search.step) == (7, 2, -4 * GIB)


def test_the_trace_of_the_instrumented_libbpf() -> None:
    create = {"v": 1, "t": 1, "pid": 5, "tid": 5, "event": "map_create", "name": "heap", "type": 34}
    create |= {
        "key_size": 4,
        "value_size": 4096,
        "max_entries": 1 << 20,
        "bytes": 4 * GIB,
        "fd": 4,
        "errno": 0,
    }
    lines = [create]
    for n in range(1024):
        hint = hex((1 << 48) - n * 4 * GIB)
        tried = {"event": "mmap", "map": "heap", "hint": hint, "length": 4 * GIB, "flags": 0x100001, "fd": 4}
        lines.append({"v": 1, "pid": 5, "tid": 5, "errno": 12, "address": "0x0", "try": n + 1} | tried)
    text = "\n".join(json.dumps(line) for line in lines)
    log = read(text)
    assert (log.created, log.searches[0].map, log.searches[0].tries) == (1, "heap", 1024)
    assert ids(text) == ["address-search"]


def test_libbpfs_words_and_its_sizes_belong_together() -> None:
    text = """
        Nov 23 19:00:01 host main[99]: libbpf: map 'heap': found value_size = 4096.
        Nov 23 19:00:01 host main[99]: libbpf: map 'heap': found max_entries = 1048576.
        libbpf: Error in bpf_create_map_xattr(heap):Cannot allocate memory(-12). Retrying without BTF.
        libbpf: map 'heap': failed to create: Cannot allocate memory(-12)
    """
    (create,) = read(textwrap.dedent(text)).creates
    assert (create.name, create.bytes, create.errno) == ("heap", 4 * GIB, errno.ENOMEM)
    assert read("libbpf: map 'heap': failed to create: -ENOMEM\n").creates[0].errno == errno.ENOMEM


def test_a_creation_that_works_when_tried_again_is_no_failure() -> None:
    retried = create_line(1, "-1 EINVAL (Invalid argument)") + create_line(1, "5")
    assert not read(retried).failed


def test_what_libbpf_tries_to_learn_about_the_kernel_is_no_failure() -> None:
    assert not read(create_line(1, "-1 EINVAL (Invalid argument)", name="libbpf_mmap")).failed


@given(st.binary(max_size=4096))
def test_no_noise_stops_the_reader(noise: bytes) -> None:
    trace.read(io.BytesIO(noise))
    log = trace.read(io.BytesIO(noise + b"\n" + create_line(1 << 26, ENOMEM).encode() + noise))
    assert any(create.bytes == 256 * GIB for create in log.creates)


@given(st.integers(0, 400))
def test_a_line_cut_off_anywhere_stops_nothing(length: int) -> None:
    for whole in (create_line(1 << 26, ENOMEM), json.dumps({"event": "mmap", "length": "x", "hint": [1]})):
        read(whole[:length])


def test_values_of_the_wrong_kind_in_a_trace_stop_nothing() -> None:
    for value in (None, [], {}, "x", -1, 1 << 70, True, 1.5):
        for key in (
            "pid",
            "errno",
            "length",
            "hint",
            "flags",
            "fd",
            "bytes",
            "type",
            "address",
            "max_entries",
        ):
            for event in ("mmap", "map_create", "start"):
                judged(json.dumps({"event": event, "errno": 12, key: value}))


def test_memory_is_bounded_whatever_the_log() -> None:
    _bounded(50 << 20)


@pytest.mark.soak
def test_memory_is_bounded_for_a_log_of_a_gigabyte() -> None:
    _bounded(1 << 30)


def _bounded(size: int) -> None:
    """Read a log of that size, from a pipe, in a process that may not grow by more than 64 MiB."""
    code = """
        import json, resource, sys
        from kflex_repro.diagnose import diagnosis, trace
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + (64 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        log = trace.read(sys.stdin.buffer)
        print(json.dumps([log.size, len(log.creates), len(log.searches), log.dropped]))
    """
    reader = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert reader.stdin is not None
    # All that could pile up: failures of ever new names, threads and lengths, halves of calls, endless lines.
    noise = os.urandom(1 << 20).replace(b"\n", b"") * 4
    written = number = 0
    while written < size:
        block = b"".join(
            create_line(1 << 26, ENOMEM, name=f"m{number + n}").encode()
            + f"{number + n} mmap(0x{n}000, {4096 * (n + 1)}, 3, MAP_SHARED, 3, 0) = {ENOMEM}\n".encode()
            + f"{number + n} mmap(NULL, 4096, 3, MAP_SHARED, 3, 0 <unfinished ...>\n".encode()
            + f"libbpf: map 'n{number + n}': found max_entries = {n}.\n".encode()
            for n in range(1000)
        )
        number += 1000
        for part in (block, noise):
            reader.stdin.write(part)
            written += len(part)
    out, _ = reader.communicate()
    assert reader.returncode == 0
    read_bytes, creates, searches, dropped = json.loads(out)
    assert read_bytes == written
    assert creates <= trace.KEPT and searches <= trace.KEPT and dropped > number


# --- the right cause, or none -----------------------------------------------------------------------------


def test_the_first_enomem() -> None:
    found = judged(create_line(1 << 26, ENOMEM) + BIG_MACHINE.replace("528280000", "65930000"))
    assert [(cause.id, cause.confidence) for cause in found.causes] == [("eager-heap", "certain")]
    assert "62.9 GiB of RAM in all (from the log)" in found.causes[0].evidence[1]


def test_ram_in_the_log_beats_this_machines() -> None:
    """256 GiB on a machine of 504: not too large, so something else; this machine's RAM is of no interest."""
    found = judged(create_line(1 << 26, ENOMEM) + BIG_MACHINE, where="unknown")
    assert found.case.where == "other"
    assert found.unknown and not found.causes


def test_the_second_enomem_in_the_artifacts_own_words() -> None:
    """Its libbpf prints no size, and calls it "failed to create" although the mmap failed."""
    words = (
        "libbpf: failed to mmap heap map 'heap': -12\n"
        "libbpf: map 'heap': failed to create: Cannot allocate memory(-12)\n"
        "libbpf: failed to load object 'ffkx_redis'\n"
    )
    found = judged(words, Heap("heap", 4, "bpf/ffkx_redis.bpf.c", 12))
    assert [cause.id for cause in found.causes] == ["address-search"]
    assert "bpf/ffkx_redis.bpf.c:12" in " ".join(found.causes[0].evidence)
    assert ids(words.rpartition("libbpf: failed to load")[0]) == ["address-search"]
    # 256 GB, as published, do get down to user space: then it is not the search.
    assert "address-search" not in ids(words, Heap("heap", 256, "bpf/ffkx_redis.bpf.c", 12))


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("mmap of heap (4294967296 bytes) failed: Cannot allocate memory", "address-search"),
        ("bpf: heap mmap failed after 1024 tries, size 4 GB: ENOMEM", "address-search"),
        ("bpf_map_create(heap, 274877906944 bytes) = ENOMEM", "eager-heap"),
        ("creating the heap map of 256GB: Cannot allocate memory", "eager-heap"),
        ("heap mmap of 256 GB: Cannot allocate memory", None),
        ("mmap: Cannot allocate memory", None),
        ("java.lang.OutOfMemoryError: heap space: Cannot allocate memory", None),
    ],
)
def test_either_enomem_in_words_of_somebody(line: str, cause: str | None) -> None:
    found = judged(line + "\n" + FOUR_LEVELS)
    assert [each.id for each in found.causes] == ([cause] if cause else [])
    assert found.unknown == (cause is None)


@pytest.mark.parametrize("gb", [1, 2, 4, 8, 16, 32, 64, 128])
def test_every_size_that_runs_out(gb: int) -> None:
    assert ids(search_lines(gb * GIB) + FOUR_LEVELS)[0] == "address-search"


def test_with_five_levels_of_paging_it_is_not_the_search() -> None:
    assert "address-search" not in ids(search_lines(4 * GIB) + FIVE_LEVELS)
    limited = "prlimit64(0, RLIMIT_AS, NULL, {rlim_cur=1024*1024, rlim_max=RLIM64_INFINITY}) = 0\n"
    assert ids(search_lines(4 * GIB) + FIVE_LEVELS + limited)[0] == "rlimit-as"


@pytest.mark.parametrize("entries", [3 * 262144, 262144 + 1, 5])
def test_a_heap_that_is_no_power_of_two(entries: int) -> None:
    assert ids(create_line(entries, "-1 ENOENT (No such file or directory)", "0x22")) == ["not-power-of-two"]


def test_a_power_of_two_with_that_errno_is_alignment() -> None:
    assert ids(create_line(1 << 20, "-1 ENOENT (No such file or directory)", "0x22")) == ["heap-alignment"]


def test_an_unknown_map_type() -> None:
    assert ids(create_line(1 << 20, "-1 EINVAL (Invalid argument)", "0x22 /* BPF_MAP_TYPE_??? */")) == [
        "no-map-type"
    ]
    # Of a type that every kernel has, EINVAL says nothing.
    found = judged(create_line(1 << 20, "-1 EINVAL (Invalid argument)"))
    assert found.unknown and not found.causes and found.exit_code == 3


def test_permission() -> None:
    denied = create_line(1, "-1 EPERM (Operation not permitted)")
    assert ids(denied) == ["capability"]
    assert ids(denied + "Lockdown: main: use of bpf to read kernel RAM is restricted\n") == ["lockdown"]
    old = "Linux version 5.4.0-90-generic (x)\nmax locked memory       (kbytes, -l) 64\n"
    assert ids(create_line(4096, "-1 EPERM (Operation not permitted)") + old)[0] == "rlimit-memlock"


def test_cgroup_v1_where_v2_is_expected() -> None:
    words = "libbpf: prog 'ffkx_redis_sockops': failed to attach to cgroup: Bad file descriptor\n"
    found = judged(words, where="other")
    assert [(cause.id, cause.recipe) for cause in found.causes] == [("cgroup2-path", "cgroup2-path")]


def test_out_of_heap() -> None:
    assert ids("terminate called after throwing an instance of 'std::bad_optional_access'\n") == [
        "out-of-heap"
    ]


def test_too_many_mappings() -> None:
    many = "".join(
        f"9 mmap(NULL, 4096, PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = {0x7F0000000000 + 8192 * n:#x}\n"
        for n in range(1000)
    )
    last = f"9 mmap(NULL, 4096, PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = {ENOMEM}\n"
    assert ids(many + last + "vm.max_map_count = 1000\n") == ["max-map-count"]
    assert "max-map-count" not in ids(many + last + "vm.max_map_count = 65530\n")


def test_private_memory_beyond_the_commit_limit() -> None:
    asked = f"9 mmap(NULL, {64 * GIB}, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = {ENOMEM}\n"
    assert ids(asked + "CommitLimit:    12342040 kB\nvm.overcommit_memory = 2\n") == ["overcommit"]
    # The same of a map is never counted: not overcommit, whatever the sysctl says.
    shared = asked.replace("MAP_PRIVATE|MAP_ANONYMOUS, -1", "MAP_SHARED, 3")
    assert "overcommit" not in ids(shared + "CommitLimit:    12342040 kB\nvm.overcommit_memory = 2\n")


@pytest.mark.parametrize(
    "text",
    [
        "9 clone(child_stack=NULL, flags=SIGCHLD) = " + ENOMEM + "\n",
        "mysqld: Cannot allocate memory for the buffer pool\n",
        create_line(16, ENOMEM, name="small") + BIG_MACHINE,
        "9 brk(0x5500000) = -1 ENOMEM (Cannot allocate memory)\n",
    ],
)
def test_an_unrelated_enomem_is_unknown_and_says_what_to_collect(text: str) -> None:
    found = judged(text)
    assert not found.causes and found.unknown and found.exit_code == 3
    assert any("strace" in line or "dmesg" in line for line in found.collect)


@pytest.mark.parametrize("text", [b"", b"\n\n", os.urandom(1 << 16), b"make: all is well\n" * 1000])
def test_a_log_of_nothing_is_unknown(text: bytes) -> None:
    found = judged(text)
    assert not found.causes and found.unknown and found.exit_code == 3


def test_a_log_of_success_has_nothing_to_explain() -> None:
    found = judged(create_line(1 << 20, "4") + search_lines(4 * GIB, 1, "0x7f0000000000"))
    assert (found.causes, found.unknown, found.exit_code) == ((), False, 0)


# --- whose facts ------------------------------------------------------------------------------------------


def test_facts_of_this_machine_are_labelled_where_they_are_assumed() -> None:
    log = read(create_line(1 << 26, ENOMEM))
    assumed = diagnosis.of_log(log, "unknown")
    assert assumed.case.facts["ram_total"].origin == "assumed"
    assert any("assumed" in note for note in assumed.notes)
    elsewhere = diagnosis.of_log(log, "other")
    assert "ram_total" not in elsewhere.case.facts
    assert elsewhere.causes[0].id == "eager-heap"


def test_sizes_are_said_in_words() -> None:
    from kflex_repro.diagnose.events import describe, size_text

    assert [size_text(n) for n in (0, 512, 4096, 3 << 29, 1 << 48)] == [
        "0 B",
        "512 B",
        "4 KiB",
        "1.5 GiB",
        "256 TiB",
    ]
    assert "256 GiB" in describe(MapCreate("heap", 12, bytes=256 * GIB))
    assert "4 GiB" in describe(Search("heap", 12, 4 * GIB))
