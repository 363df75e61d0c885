"""Where bpffs, tracefs and cgroup v2 are mounted, and pins on bpffs."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

from kflex_repro.bpf import libbpf
from kflex_repro.errors import KflexError, os_failure

BPFFS = Path("/sys/fs/bpf")


def mounts(fstype: str) -> list[Path]:
    """Mount points of a file system type in this mount namespace, in mount order."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[fields.index("-") + 1] == fstype:
            # Spaces and the like are written as octal escapes.
            point = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), fields[4]))
            if point not in found:
                found.append(point)
    return found


def cgroup2_root() -> Path | None:
    """The cgroup v2 mount: /sys/fs/cgroup, or /sys/fs/cgroup/unified on hybrid hosts; None if missing."""
    found = mounts("cgroup2")
    return found[0] if found else None


def bpffs_root() -> Path | None:
    """/sys/fs/bpf if a bpffs is mounted there, else None: one elsewhere is somebody's private one."""
    return BPFFS if BPFFS in mounts("bpf") else None


def mount(fstype: str, point: Path) -> None:
    """Mount a kernel file system (``bpf``, ``tracefs``, ``cgroup2``) at an existing directory."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(fstype.encode(), str(point).encode(), fstype.encode(), 0, None) != 0:
        raise os_failure(f"mount -t {fstype}", ctypes.get_errno(), str(point))


def ensure_bpffs() -> Path:
    """The bpffs mount; mounts it at /sys/fs/bpf where it is missing (needs root)."""
    found = bpffs_root()
    if found is None:
        mount("bpf", BPFFS)
        found = BPFFS
    return found


def pin(fd: int, path: Path, what: str) -> None:
    """Pin a map, program or link; the directories down to it are made. Fails if the path exists."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise os_failure("mkdir", error.errno or 0, str(path.parent)) from None
    on_bpffs = any(path.resolve().is_relative_to(point) for point in mounts("bpf"))
    fix = "" if on_bpffs else "the path is not on a bpffs; mount one: mount -t bpf bpf /sys/fs/bpf"
    libbpf.check(
        libbpf.library().bpf_obj_pin(fd, os.fsencode(path)), f"bpf_obj_pin of {what}", str(path), fix
    )


def get_pinned(path: Path, kind: str) -> int:
    """A new descriptor of the object pinned at ``path``, which must be a ``map``, ``prog`` or ``link``."""
    fd: int = libbpf.check(libbpf.library().bpf_obj_get(os.fsencode(path)), "bpf_obj_get", str(path))
    found = libbpf.fd_kind(fd)
    if found != kind:
        os.close(fd)
        raise KflexError(f"pinned object is a {found}, not a {kind}", str(path))
    return fd


def unpin(path: Path) -> None:
    """Remove a pin; no error if it is gone already."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise os_failure("unlink", error.errno or 0, str(path)) from None
