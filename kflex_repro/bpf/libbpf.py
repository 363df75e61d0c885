"""The functions of libbpf.so.1 (version 1.1 or newer) that this package calls, with their C signatures.

libbpf 1.x reports failure as a NULL pointer or a negative return value, with errno set in both cases;
``check`` and ``check_pointer`` turn that into a KflexError that names the call. What libbpf prints is
collected (``captured``), not shown; ``KFLEX_LIBBPF_LOG=1`` in the environment shows all of it on stderr.
"""

from __future__ import annotations

import contextlib
import ctypes as c
import enum
import functools
import mmap
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kflex_repro.errors import Unavailable, os_failure

MINIMUM = (1, 1)


class ProgType(enum.IntEnum):
    """Program types (linux/bpf.h)."""

    KPROBE = 2
    SCHED_CLS = 3
    TRACEPOINT = 5
    XDP = 6
    SOCK_OPS = 13
    SK_SKB = 14
    SK_MSG = 16
    RAW_TRACEPOINT = 17
    TRACING = 26


class MapType(enum.IntEnum):
    """Map types (linux/bpf.h)."""

    HASH = 1
    ARRAY = 2
    PERCPU_HASH = 5
    PERCPU_ARRAY = 6
    LRU_HASH = 9
    LRU_PERCPU_HASH = 10
    ARRAY_OF_MAPS = 12
    HASH_OF_MAPS = 13
    SOCKMAP = 15
    SOCKHASH = 18
    PERCPU_CGROUP_STORAGE = 21
    QUEUE = 22
    STACK = 23
    SK_STORAGE = 24
    RINGBUF = 27
    ARENA = 33


class AttachType(enum.IntEnum):
    """Attach types (linux/bpf.h)."""

    CGROUP_SOCK_OPS = 3
    SK_SKB_STREAM_PARSER = 4
    SK_SKB_STREAM_VERDICT = 5
    SK_MSG_VERDICT = 7
    TRACE_RAW_TP = 23
    TRACE_FENTRY = 24
    TRACE_FEXIT = 25
    TRACE_ITER = 28
    SK_SKB_VERDICT = 38
    TCX_INGRESS = 46
    TCX_EGRESS = 47
    TRACE_UPROBE_MULTI = 48


BPF_ANY, BPF_NOEXIST, BPF_EXIST = 0, 1, 2
BPF_F_MMAPABLE = 1 << 10
BPF_STATS_RUN_TIME = 0
PER_CPU_TYPES = frozenset(
    {
        MapType.PERCPU_HASH,
        MapType.PERCPU_ARRAY,
        MapType.LRU_PERCPU_HASH,
        MapType.PERCPU_CGROUP_STORAGE,
    }
)
KEYLESS_TYPES = frozenset({MapType.QUEUE, MapType.STACK})


class MapInfo(c.Structure):
    """struct bpf_map_info, as of Linux 6.1; the kernel fills what it knows."""

    _fields_ = [
        ("type", c.c_uint32),
        ("id", c.c_uint32),
        ("key_size", c.c_uint32),
        ("value_size", c.c_uint32),
        ("max_entries", c.c_uint32),
        ("map_flags", c.c_uint32),
        ("name", c.c_char * 16),
        ("ifindex", c.c_uint32),
        ("btf_vmlinux_value_type_id", c.c_uint32),
        ("netns_dev", c.c_uint64),
        ("netns_ino", c.c_uint64),
        ("btf_id", c.c_uint32),
        ("btf_key_type_id", c.c_uint32),
        ("btf_value_type_id", c.c_uint32),
        ("unused", c.c_uint32),
        ("map_extra", c.c_uint64),
    ]


class ProgInfo(c.Structure):
    """struct bpf_prog_info, as of Linux 6.1."""

    _fields_ = [
        ("type", c.c_uint32),
        ("id", c.c_uint32),
        ("tag", c.c_uint8 * 8),
        ("jited_prog_len", c.c_uint32),
        ("xlated_prog_len", c.c_uint32),
        ("jited_prog_insns", c.c_uint64),
        ("xlated_prog_insns", c.c_uint64),
        ("load_time", c.c_uint64),
        ("created_by_uid", c.c_uint32),
        ("nr_map_ids", c.c_uint32),
        ("map_ids", c.c_uint64),
        ("name", c.c_char * 16),
        ("ifindex", c.c_uint32),
        ("gpl_compatible", c.c_uint32),
        ("netns_dev", c.c_uint64),
        ("netns_ino", c.c_uint64),
        ("nr_jited_ksyms", c.c_uint32),
        ("nr_jited_func_lens", c.c_uint32),
        ("jited_ksyms", c.c_uint64),
        ("jited_func_lens", c.c_uint64),
        ("btf_id", c.c_uint32),
        ("func_info_rec_size", c.c_uint32),
        ("func_info", c.c_uint64),
        ("nr_func_info", c.c_uint32),
        ("nr_line_info", c.c_uint32),
        ("line_info", c.c_uint64),
        ("jited_line_info", c.c_uint64),
        ("nr_jited_line_info", c.c_uint32),
        ("line_info_rec_size", c.c_uint32),
        ("jited_line_info_rec_size", c.c_uint32),
        ("nr_prog_tags", c.c_uint32),
        ("prog_tags", c.c_uint64),
        ("run_time_ns", c.c_uint64),
        ("run_cnt", c.c_uint64),
        ("recursion_misses", c.c_uint64),
        ("verified_insns", c.c_uint32),
        ("attach_btf_obj_id", c.c_uint32),
        ("attach_btf_id", c.c_uint32),
        ("padding", c.c_uint32),
    ]


class LinkInfo(c.Structure):
    """The head of struct bpf_link_info, common to all link types."""

    _fields_ = [("type", c.c_uint32), ("id", c.c_uint32), ("prog_id", c.c_uint32), ("rest", c.c_uint8 * 52)]


class MapCreateOpts(c.Structure):
    """struct bpf_map_create_opts of libbpf 1.1."""

    _fields_ = [
        ("sz", c.c_size_t),
        ("btf_fd", c.c_uint32),
        ("btf_key_type_id", c.c_uint32),
        ("btf_value_type_id", c.c_uint32),
        ("btf_vmlinux_value_type_id", c.c_uint32),
        ("inner_map_fd", c.c_uint32),
        ("map_flags", c.c_uint32),
        ("map_extra", c.c_uint64),
        ("numa_node", c.c_uint32),
        ("map_ifindex", c.c_uint32),
    ]


class ProgLoadOpts(c.Structure):
    """struct bpf_prog_load_opts of libbpf 1.1."""

    _fields_ = [
        ("sz", c.c_size_t),
        ("attempts", c.c_int),
        ("expected_attach_type", c.c_uint32),
        ("prog_btf_fd", c.c_uint32),
        ("prog_flags", c.c_uint32),
        ("prog_ifindex", c.c_uint32),
        ("kern_version", c.c_uint32),
        ("attach_btf_id", c.c_uint32),
        ("attach_prog_fd", c.c_uint32),
        ("attach_btf_obj_fd", c.c_uint32),
        ("fd_array", c.c_void_p),
        ("func_info", c.c_void_p),
        ("func_info_cnt", c.c_uint32),
        ("func_info_rec_size", c.c_uint32),
        ("line_info", c.c_void_p),
        ("line_info_cnt", c.c_uint32),
        ("line_info_rec_size", c.c_uint32),
        ("log_level", c.c_uint32),
        ("log_size", c.c_uint32),
        ("log_buf", c.c_void_p),
    ]


class IterAttachOpts(c.Structure):
    """struct bpf_iter_attach_opts; link_info points to a union, for map iterators: the map's descriptor."""

    _fields_ = [("sz", c.c_size_t), ("link_info", c.c_void_p), ("link_info_len", c.c_uint32)]


class UprobeOpts(c.Structure):
    """struct bpf_uprobe_opts of libbpf 1.1."""

    _fields_ = [
        ("sz", c.c_size_t),
        ("ref_ctr_offset", c.c_size_t),
        ("bpf_cookie", c.c_uint64),
        ("retprobe", c.c_bool),
        ("func_name", c.c_char_p),
    ]


class TestRunOpts(c.Structure):
    """struct bpf_test_run_opts of libbpf 1.1."""

    _fields_ = [
        ("sz", c.c_size_t),
        ("data_in", c.c_void_p),
        ("data_out", c.c_void_p),
        ("data_size_in", c.c_uint32),
        ("data_size_out", c.c_uint32),
        ("ctx_in", c.c_void_p),
        ("ctx_out", c.c_void_p),
        ("ctx_size_in", c.c_uint32),
        ("ctx_size_out", c.c_uint32),
        ("retval", c.c_uint32),
        ("repeat", c.c_int),
        ("duration", c.c_uint32),
        ("flags", c.c_uint32),
        ("cpu", c.c_uint32),
        ("batch_size", c.c_uint32),
    ]


PTR, STR, INT, U32, U64, SIZE = c.c_void_p, c.c_char_p, c.c_int, c.c_uint32, c.c_uint64, c.c_size_t

_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "libbpf_major_version": (U32, []),
    "libbpf_minor_version": (U32, []),
    "libbpf_num_possible_cpus": (INT, []),
    "libbpf_set_print": (PTR, [PTR]),
    "libbpf_bpf_map_type_str": (STR, [INT]),
    "libbpf_bpf_prog_type_str": (STR, [INT]),
    "libbpf_bpf_link_type_str": (STR, [INT]),
    "bpf_object__open_file": (PTR, [STR, PTR]),
    "bpf_object__load": (INT, [PTR]),
    "bpf_object__close": (None, [PTR]),
    "bpf_object__btf": (PTR, [PTR]),
    "bpf_object__next_map": (PTR, [PTR, PTR]),
    "bpf_object__next_program": (PTR, [PTR, PTR]),
    "btf__raw_data": (PTR, [PTR, c.POINTER(U32)]),
    "bpf_map__name": (STR, [PTR]),
    "bpf_map__fd": (INT, [PTR]),
    "bpf_map__type": (INT, [PTR]),
    "bpf_map__key_size": (U32, [PTR]),
    "bpf_map__value_size": (U32, [PTR]),
    "bpf_map__max_entries": (U32, [PTR]),
    "bpf_map__map_flags": (U32, [PTR]),
    "bpf_map__set_max_entries": (INT, [PTR, U32]),
    "bpf_map__set_value_size": (INT, [PTR, U32]),
    "bpf_map__set_autocreate": (INT, [PTR, c.c_bool]),
    "bpf_map__is_internal": (c.c_bool, [PTR]),
    "bpf_map__reuse_fd": (INT, [PTR, INT]),
    "bpf_map__initial_value": (PTR, [PTR, c.POINTER(SIZE)]),
    "bpf_map_create": (INT, [INT, STR, U32, U32, U32, PTR]),
    "bpf_map_lookup_elem": (INT, [INT, PTR, PTR]),
    "bpf_map_update_elem": (INT, [INT, PTR, PTR, U64]),
    "bpf_map_delete_elem": (INT, [INT, PTR]),
    "bpf_map_lookup_and_delete_elem": (INT, [INT, PTR, PTR]),
    "bpf_map_get_next_key": (INT, [INT, PTR, PTR]),
    "bpf_obj_pin": (INT, [INT, STR]),
    "bpf_obj_get": (INT, [STR]),
    "bpf_obj_get_info_by_fd": (INT, [INT, PTR, c.POINTER(U32)]),
    "bpf_program__name": (STR, [PTR]),
    "bpf_program__section_name": (STR, [PTR]),
    "bpf_program__fd": (INT, [PTR]),
    "bpf_program__type": (INT, [PTR]),
    "bpf_program__expected_attach_type": (INT, [PTR]),
    "bpf_program__autoload": (c.c_bool, [PTR]),
    "bpf_program__set_autoload": (INT, [PTR, c.c_bool]),
    "bpf_program__set_attach_target": (INT, [PTR, INT, STR]),
    "bpf_program__attach": (PTR, [PTR]),
    "bpf_program__attach_iter": (PTR, [PTR, PTR]),
    "bpf_program__attach_uprobe_opts": (PTR, [PTR, INT, STR, SIZE, PTR]),
    "bpf_program__set_expected_attach_type": (INT, [PTR, INT]),
    "bpf_prog_load": (INT, [INT, STR, STR, PTR, SIZE, PTR]),
    "libbpf_find_vmlinux_btf_id": (INT, [STR, INT]),
    "bpf_raw_tracepoint_open": (INT, [STR, INT]),
    "bpf_link_create": (INT, [INT, INT, INT, PTR]),
    "bpf_link_detach": (INT, [INT]),
    "bpf_link__fd": (INT, [PTR]),
    "bpf_link__destroy": (INT, [PTR]),
    "bpf_iter_create": (INT, [INT]),
    "bpf_prog_attach": (INT, [INT, INT, INT, c.c_uint]),
    "bpf_prog_get_fd_by_id": (INT, [c.c_uint32]),
    "bpf_prog_detach2": (INT, [INT, INT, INT]),
    "bpf_prog_test_run_opts": (INT, [INT, PTR]),
    "bpf_enable_stats": (INT, [INT]),
}

# A verifier log can be long, so it gets a buffer of this size, mapped but not touched beyond the text.
_LOG_BYTES = 64 << 20
_LINE_BYTES = 16 << 10

_local = threading.local()
_PRINT = c.CFUNCTYPE(INT, INT, STR, PTR)
_libc = c.CDLL(None, use_errno=True)
_libc.vsnprintf.argtypes = [PTR, SIZE, STR, PTR]
_libc.vsnprintf.restype = INT


def _formatted(fmt: bytes, arguments: int) -> str:
    # vsnprintf consumes the va_list: one try, so the buffer must be large enough at once.
    size = _LOG_BYTES if b"PROG LOAD LOG" in fmt else _LINE_BYTES
    with mmap.mmap(-1, size) as area:
        buffer = (c.c_char * size).from_buffer(area)
        _libc.vsnprintf(c.addressof(buffer), size, fmt, arguments)
        text = buffer.value
        del buffer
    return text.decode(errors="replace")


@_PRINT
def _on_print(level: int, fmt: bytes, arguments: int) -> int:
    # Level 2 is libbpf's debug output: hundreds of lines for each load, formatted only when someone looks.
    show = os.environ.get("KFLEX_LIBBPF_LOG") == "1"
    sinks: list[list[str]] = getattr(_local, "sinks", [])
    if not show and (level > 1 or not sinks):
        return 0
    text = _formatted(fmt, arguments)
    if show:
        sys.stderr.write(text)
    if sinks and level <= 1:
        sinks[-1].append(text)
    return 0


@contextlib.contextmanager
def captured() -> Iterator[list[str]]:
    """Collect what libbpf prints in this thread, warnings and infos, one list item each."""
    sinks: list[list[str]] = _local.__dict__.setdefault("sinks", [])
    lines: list[str] = []
    sinks.append(lines)
    try:
        yield lines
    finally:
        sinks.pop()


@functools.cache
def library() -> c.CDLL:
    """The loaded libbpf, signatures declared; KFLEX_LIBBPF names another file than the system's libbpf.so.1.

    Raises Unavailable where there is none or it is too old.
    """
    name = os.environ.get("KFLEX_LIBBPF", "libbpf.so.1")
    fix = "install libbpf 1.1 or newer (Debian/Ubuntu: apt install libbpf1)"
    try:
        lib = c.CDLL(name, use_errno=True)
    except OSError as error:
        raise Unavailable(f"cannot load libbpf: {error}", name, fix) from None
    try:
        for function, (restype, argtypes) in _SIGNATURES.items():
            entry = getattr(lib, function)
            entry.restype, entry.argtypes = restype, argtypes
    except AttributeError:
        raise Unavailable(f"libbpf lacks {function}", name, fix) from None
    found = (lib.libbpf_major_version(), lib.libbpf_minor_version())
    if found < MINIMUM:
        raise Unavailable(f"libbpf {found[0]}.{found[1]} is too old", name, fix)
    lib.libbpf_set_print(c.cast(_on_print, PTR))
    return lib


def version() -> tuple[int, int]:
    """(major, minor) of the loaded libbpf."""
    lib = library()
    return lib.libbpf_major_version(), lib.libbpf_minor_version()


def check(result: int, call: str, where: str = "", fix: str = "") -> int:
    """Return a non-negative result; raise the KflexError of a negative one."""
    if result < 0:
        # Low-level wrappers return -errno in libbpf 1.x; -1 with errno set is the older form.
        code = c.get_errno() if result == -1 and c.get_errno() else -result
        raise os_failure(call, code, where, fix)
    return result


def check_pointer(pointer: int | None, call: str, where: str = "", fix: str = "") -> int:
    """Return a pointer; raise the KflexError of a NULL one."""
    if not pointer:
        raise os_failure(call, c.get_errno(), where, fix)
    return pointer


def object_info(fd: int, info: c.Structure, call: str) -> None:
    """Fill ``info`` (MapInfo, ProgInfo, LinkInfo) for the object behind ``fd``."""
    size = U32(c.sizeof(info))
    check(
        library().bpf_obj_get_info_by_fd(fd, c.byref(info), c.byref(size)), f"{call}: bpf_obj_get_info_by_fd"
    )


def fd_kind(fd: int) -> str:
    """``map``, ``prog``, ``link``, or the kernel's name of whatever else the descriptor is."""
    target = str(Path(f"/proc/self/fd/{fd}").readlink())
    # Links are called bpf_link or bpf-link, depending on the kernel's version.
    match = re.fullmatch(r"anon_inode:\[?bpf[-_](map|prog|link)\]?", target)
    return match.group(1) if match else target


@contextlib.contextmanager
def run_statistics() -> Iterator[None]:
    """While inside, the kernel counts runs and time of all BPF programs, at a small cost for each run."""
    fd = check(library().bpf_enable_stats(BPF_STATS_RUN_TIME), "bpf_enable_stats")
    try:
        yield
    finally:
        os.close(fd)
