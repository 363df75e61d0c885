"""What this kernel lets us do with BPF, each found out by doing it.

A probe loads a two-instruction program, attaches it where it touches nothing of anybody's, and takes it off
again. It returns a few words for the report, or raises KflexError.
"""

from __future__ import annotations

import contextlib
import ctypes as c
import os
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from kflex_repro.bpf import fs, libbpf, uprobe
from kflex_repro.bpf.libbpf import AttachType, MapType, ProgType, check
from kflex_repro.bpf.links import Program
from kflex_repro.bpf.maps import Map
from kflex_repro.errors import Unavailable, os_failure

# A kernel function that only BPF's own test run calls: attaching to it disturbs nothing.
_QUIET_FUNCTION = b"bpf_fentry_test1"
_CLONE_NEWNET = 0x40000000
_PERF_FLAG_FD_CLOEXEC = 8
_BPF_PERF_EVENT = 41


def _returning(value: int) -> bytes:
    """mov r0, value; exit"""
    return struct.pack("<BBhi", 0xB7, 0, 0, value) + struct.pack("<BBhi", 0x95, 0, 0, 0)


def _load(prog_type: int, value: int, attach_type: int = 0, btf_id: int = 0) -> Program:
    instructions = _returning(value)
    opts = libbpf.ProgLoadOpts(
        sz=c.sizeof(libbpf.ProgLoadOpts), expected_attach_type=attach_type, attach_btf_id=btf_id
    )
    fd = libbpf.library().bpf_prog_load(
        prog_type, b"kflex_probe", b"GPL", instructions, len(instructions) // 8, c.byref(opts)
    )
    return Program(fd=check(fd, "bpf_prog_load"), name="kflex_probe")


def _btf_id(name: bytes, attach_type: int) -> int:
    with libbpf.captured():
        found = libbpf.library().libbpf_find_vmlinux_btf_id(name, attach_type)
    if found <= 0:
        raise Unavailable(f"the kernel's BTF has no {name.decode()}")
    return int(found)


@contextlib.contextmanager
def _cgroup() -> Iterator[Path]:
    root = fs.cgroup2_root()
    if root is None:
        raise Unavailable("no cgroup v2 mount")
    try:
        path = Path(tempfile.mkdtemp(prefix="kflex-probe-", dir=root))
    except OSError as error:
        raise os_failure("mkdir in the cgroup v2", error.errno or 0, str(root)) from None
    try:
        yield path
    finally:
        path.rmdir()


def sockops() -> str:
    """A sockops program on a cgroup."""
    with _cgroup() as path, _load(ProgType.SOCK_OPS, 1) as program, program.attach_cgroup(path):
        return "loads, attaches to a cgroup"


def _on_sockmap(prog_type: int, *attach_types: int) -> str:
    with (
        Map.create(MapType.SOCKMAP, 4, 8, 1, name="kflex_probe") as sockets,
        _load(prog_type, 1) as program,
    ):
        for attach_type in attach_types:
            program.attach_map(sockets, attach_type)
        for attach_type in attach_types:
            program.detach_map(sockets, attach_type)
    return "loads, attaches to a sockmap"


def sk_msg() -> str:
    """An sk_msg verdict on a sockmap."""
    return _on_sockmap(ProgType.SK_MSG, AttachType.SK_MSG_VERDICT)


def sk_skb() -> str:
    """A stream parser and verdict on a sockmap."""
    return _on_sockmap(ProgType.SK_SKB, AttachType.SK_SKB_STREAM_PARSER, AttachType.SK_SKB_STREAM_VERDICT)


def tp_btf() -> str:
    """A BTF tracepoint program on sched_switch."""
    btf_id = _btf_id(b"sched_switch", AttachType.TRACE_RAW_TP)
    with _load(ProgType.TRACING, 0, AttachType.TRACE_RAW_TP, btf_id) as program:
        os.close(check(libbpf.library().bpf_raw_tracepoint_open(None, program.fd), "bpf_raw_tracepoint_open"))
    return "loads, attaches to sched_switch"


def iter_tcp() -> str:
    """An iterator over TCP sockets, run once."""
    btf_id = _btf_id(b"tcp", AttachType.TRACE_ITER)
    with _load(ProgType.TRACING, 0, AttachType.TRACE_ITER, btf_id) as program:
        link = check(
            libbpf.library().bpf_link_create(program.fd, 0, AttachType.TRACE_ITER, None), "bpf_link_create"
        )
        try:
            iterator = check(libbpf.library().bpf_iter_create(link), "bpf_iter_create")
            try:
                os.read(iterator, 1)
            finally:
                os.close(iterator)
        finally:
            os.close(link)
    return "loads, walks the sockets"


def fentry() -> str:
    """A program at a kernel function's entry."""
    btf_id = _btf_id(_QUIET_FUNCTION, AttachType.TRACE_FENTRY)
    with _load(ProgType.TRACING, 0, AttachType.TRACE_FENTRY, btf_id) as program:
        os.close(check(libbpf.library().bpf_raw_tracepoint_open(None, program.fd), "attaching fentry"))
    return "loads, attaches"


def kprobe() -> str:
    """A program on a kprobe."""
    pmu = Path("/sys/bus/event_source/devices/kprobe/type")
    if not pmu.exists():
        raise Unavailable("the kernel has no kprobes")
    name = c.create_string_buffer(_QUIET_FUNCTION)
    attributes = bytearray(112)
    struct.pack_into("<II", attributes, 0, int(pmu.read_text()), len(attributes))
    struct.pack_into("<Q", attributes, 56, c.addressof(name))
    libc = c.CDLL(None, use_errno=True)
    number = 298 if os.uname().machine == "x86_64" else 241
    buffer = (c.c_char * len(attributes)).from_buffer(attributes)
    with _load(ProgType.KPROBE, 0) as program:
        event = libc.syscall(number, c.byref(buffer), -1, 0, -1, c.c_ulong(_PERF_FLAG_FD_CLOEXEC))
        if event < 0:
            raise os_failure("perf_event_open of a kprobe", c.get_errno())
        try:
            link = libbpf.library().bpf_link_create(program.fd, event, _BPF_PERF_EVENT, None)
            os.close(check(link, "attaching to the kprobe"))
        finally:
            os.close(event)
    return "loads, attaches"


def _own_entry() -> uprobe.Place:
    """Our interpreter's first instruction: it never runs again."""
    from elftools.elf.elffile import ELFFile

    with Path("/proc/self/exe").open("rb") as stream:
        elf = ELFFile(stream)
        return uprobe.Place(int(next(elf.address_offsets(elf["e_entry"]))), 0)


def uprobe_multi() -> str:
    """Uprobes at many places by one link (Linux 6.6)."""
    with (
        _load(ProgType.KPROBE, 0, AttachType.TRACE_UPROBE_MULTI) as program,
        uprobe.attach_multi(program, Path("/proc/self/exe"), [_own_entry()], os.getpid()),
    ):
        return "loads, attaches"


def _in_new_netns(work: Callable[[], None]) -> None:
    """Run ``work`` in a network namespace of its own: a thread's, gone with the thread."""
    failure: list[BaseException] = []

    def body() -> None:
        try:
            if c.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) != 0:
                raise os_failure("unshare of the network namespace", c.get_errno())
            work()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]


def tcx() -> str:
    """A traffic control program attached by a link, on the loopback device of an empty network namespace."""

    def attach() -> None:
        with _load(ProgType.SCHED_CLS, -1) as program:
            loopback = 1
            link = libbpf.library().bpf_link_create(program.fd, loopback, AttachType.TCX_INGRESS, None)
            os.close(check(link, "attaching tcx"))

    _in_new_netns(attach)
    return "loads, attaches to a device"


def mmapable() -> str:
    """An array map shared with user space."""
    with (
        Map.create(MapType.ARRAY, 4, 64, 64, libbpf.BPF_F_MMAPABLE, "kflex_probe") as table,
        table.mmap() as view,
    ):
        view[64:68] = b"seen"
        if (table.get((1).to_bytes(4, "little")) or b"")[:4] != b"seen":
            raise Unavailable("a store to the mapping did not reach the map")
    return "shared memory works"


def arena() -> str:
    """A one-page arena."""
    with Map.create(MapType.ARENA, 0, 0, 1, libbpf.BPF_F_MMAPABLE, "kflex_probe"):
        return "can be made"
