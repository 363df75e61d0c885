"""Programs and the links that attach them."""

from __future__ import annotations

import ctypes as c
import os
from pathlib import Path

from kflex_repro.bpf import fs, libbpf
from kflex_repro.bpf.libbpf import check, check_pointer
from kflex_repro.bpf.maps import Map
from kflex_repro.errors import KflexError, os_failure


class Link:
    """An attachment. It ends when its last descriptor and pin are gone; ``destroy()`` gives up ours."""

    def __init__(self, *, pointer: int | None = None, fd: int = -1, name: str = "") -> None:
        self._pointer = pointer
        self._fd = fd
        self._name = name
        self._pin: Path | None = None

    @classmethod
    def from_pin(cls, path: Path) -> Link:
        """The link pinned at ``path``."""
        opened = cls(fd=fs.get_pinned(path, "link"), name=path.name)
        opened._pin = path
        return opened

    @property
    def fd(self) -> int:
        """The descriptor; a KflexError after destroy."""
        if self._pointer:
            return int(libbpf.library().bpf_link__fd(self._pointer))
        if self._fd < 0:
            raise KflexError("the link is destroyed", self._name)
        return self._fd

    def _info(self) -> libbpf.LinkInfo:
        info = libbpf.LinkInfo()
        libbpf.object_info(self.fd, info, f"link {self._name}")
        return info

    @property
    def id(self) -> int:
        """The kernel's id of the link."""
        return int(self._info().id)

    @property
    def prog_id(self) -> int:
        """The kernel's id of the attached program."""
        return int(self._info().prog_id)

    def pin(self, path: Path) -> None:
        """Pin on bpffs: the attachment then outlives this process."""
        fs.pin(self.fd, path, f"link {self._name}")
        self._pin = path

    def unpin(self) -> None:
        """Remove the pin made by pin(), or the one it was opened from."""
        if self._pin is not None:
            fs.unpin(self._pin)
            self._pin = None

    def detach(self) -> None:
        """Detach at once, whoever else holds the link (cgroup and network links; tracing links cannot)."""
        check(libbpf.library().bpf_link_detach(self.fd), "bpf_link_detach", self._name)

    def destroy(self) -> None:
        """Close our descriptor: detaches, unless a pin or another process holds the link. No error twice."""
        pointer, self._pointer = self._pointer, None
        fd, self._fd = self._fd, -1
        if pointer:
            check(libbpf.library().bpf_link__destroy(pointer), "bpf_link__destroy", self._name)
        elif fd >= 0:
            os.close(fd)

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.destroy()

    def read_iter(self) -> bytes:
        """Run an iterator link's program over everything, and return what it wrote."""
        fd = check(libbpf.library().bpf_iter_create(self.fd), "bpf_iter_create", self._name)
        try:
            parts = []
            while part := os.read(fd, 1 << 16):
                parts.append(part)
            return b"".join(parts)
        except OSError as error:
            raise os_failure("read of the iterator", error.errno or 0, self._name) from None
        finally:
            os.close(fd)


class Program:
    """One BPF program: of an Object (which owns its descriptor), or of a pin (ours, ``close()``)."""

    def __init__(self, *, pointer: int | None = None, fd: int = -1, name: str = "") -> None:
        self._pointer = pointer
        self._fd = fd
        self._name = name
        self._pin: Path | None = None

    def __repr__(self) -> str:
        return f"<Program {self.name}>"

    @classmethod
    def from_pin(cls, path: Path) -> Program:
        """The program pinned at ``path``."""
        opened = cls(fd=fs.get_pinned(path, "prog"))
        opened._pin = path
        return opened

    def close(self) -> None:
        """Close a descriptor of our own; for a program of an Object, forget it."""
        if self._pointer is None and self._fd >= 0:
            os.close(self._fd)
        self._pointer, self._fd = None, -1

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def fd(self) -> int:
        """The descriptor; a KflexError before load and after close."""
        fd = libbpf.library().bpf_program__fd(self._pointer) if self._pointer else self._fd
        if fd < 0:
            raise KflexError("the program is not in the kernel", self._name, "load the object first")
        return int(fd)

    @property
    def info(self) -> libbpf.ProgInfo:
        """The kernel's struct bpf_prog_info, read anew each time."""
        info = libbpf.ProgInfo()
        libbpf.object_info(self.fd, info, f"program {self._name}")
        return info

    @property
    def name(self) -> str:
        """The function's name (the kernel keeps its first 15 bytes)."""
        return self._name or str(self.info.name.decode())

    @property
    def type(self) -> int:
        """The program type, see libbpf.ProgType."""
        return int(libbpf.library().bpf_program__type(self._pointer) if self._pointer else self.info.type)

    @property
    def section(self) -> str:
        """The ELF section of an object's program, "" for a pin's."""
        if not self._pointer:
            return ""
        return str(libbpf.library().bpf_program__section_name(self._pointer).decode())

    @property
    def id(self) -> int:
        """The kernel's id of the program."""
        return int(self.info.id)

    @property
    def run_cnt(self) -> int:
        """How often it ran while libbpf.run_statistics() was on."""
        return int(self.info.run_cnt)

    @property
    def run_time_ns(self) -> int:
        """Nanoseconds spent in it while libbpf.run_statistics() was on."""
        return int(self.info.run_time_ns)

    # --- before load ---------------------------------------------------------------------------------------

    def set_autoload(self, load: bool) -> None:
        """Whether load() loads this program."""
        check(libbpf.library().bpf_program__set_autoload(self._pointer, load), "set_autoload", self._name)

    def set_attach_target(self, function: str, target_fd: int = 0) -> None:
        """The kernel function (or the target program's one) that a tracing program is for."""
        result = libbpf.library().bpf_program__set_attach_target(self._pointer, target_fd, function.encode())
        check(result, f"set_attach_target {function}", self._name)

    def set_expected_attach_type(self, attach_type: int) -> None:
        """What kind of attachment the program is for, where its section name does not say it."""
        result = libbpf.library().bpf_program__set_expected_attach_type(self._pointer, attach_type)
        check(result, "set_expected_attach_type", self._name)

    # --- attach --------------------------------------------------------------------------------------------

    def attach(self) -> Link:
        """Attach where the section name says (tp_btf, raw_tp, tracepoint, fentry, kprobe, uprobe, ...)."""
        if not self._pointer:
            raise KflexError("a pinned program has no section to attach by", self.name)
        with libbpf.captured() as lines:
            pointer = libbpf.library().bpf_program__attach(self._pointer)
        detail = lines[-1].strip() if lines and not pointer else ""
        return Link(
            pointer=check_pointer(pointer, "bpf_program__attach", f"{self.name} {detail}".strip()),
            name=self.name,
        )

    def attach_cgroup(self, path: Path, attach_type: int = libbpf.AttachType.CGROUP_SOCK_OPS) -> Link:
        """Attach to a cgroup v2 directory; a sockops program unless ``attach_type`` says otherwise."""
        try:
            cgroup = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise os_failure("open of the cgroup", error.errno or 0, str(path)) from None
        try:
            fd = libbpf.library().bpf_link_create(self.fd, cgroup, attach_type, None)
            fix = "the path is not a cgroup v2 directory: see `kflex-repro doctor`" if fd == -9 else ""
            return Link(
                fd=check(fd, "bpf_link_create on the cgroup", f"{self.name}, {path}", fix), name=self.name
            )
        finally:
            os.close(cgroup)

    def attach_uprobe(
        self, path: Path, offset: int, cookie: int = 0, pid: int = -1, returning: bool = False
    ) -> Link:
        """Attach at a file's ``offset`` (bytes), in one process that maps it or (-1) in all of them.

        The program sees ``cookie`` by bpf_get_attach_cookie(). For many places see bpf/uprobe.py.
        """
        opts = libbpf.UprobeOpts(sz=c.sizeof(libbpf.UprobeOpts), bpf_cookie=cookie, retprobe=returning)
        with libbpf.captured() as lines:
            pointer = libbpf.library().bpf_program__attach_uprobe_opts(
                self._pointer, pid, os.fsencode(path), offset, c.byref(opts)
            )
        detail = lines[-1].strip() if lines and not pointer else f"{path}+{offset:#x}"
        return Link(pointer=check_pointer(pointer, "attaching the uprobe", detail), name=self.name)

    def attach_map(self, target: Map, attach_type: int) -> None:
        """Attach to a SOCKMAP or SOCKHASH (no link: it stays until detach_map or the map's end)."""
        result = libbpf.library().bpf_prog_attach(self.fd, target.fd, attach_type, 0)
        check(result, "bpf_prog_attach", f"{self.name} on map {target.name}")

    def detach_map(self, target: Map, attach_type: int) -> None:
        """Undo attach_map."""
        result = libbpf.library().bpf_prog_detach2(self.fd, target.fd, attach_type)
        check(result, "bpf_prog_detach2", f"{self.name} on map {target.name}")

    def attach_iter(self, target: Map | None = None) -> Link:
        """Attach an iterator program (of a map's elements if ``target`` is given); then Link.read_iter()."""
        if not self._pointer:
            raise KflexError("a pinned iterator program cannot be attached", self.name)
        opts = libbpf.IterAttachOpts(sz=c.sizeof(libbpf.IterAttachOpts))
        link_info = (c.c_uint32 * 4)(target.fd if target is not None else 0)
        if target is not None:
            opts.link_info = c.addressof(link_info)
            opts.link_info_len = c.sizeof(link_info)
        pointer = libbpf.library().bpf_program__attach_iter(self._pointer, c.byref(opts))
        return Link(pointer=check_pointer(pointer, "bpf_program__attach_iter", self.name), name=self.name)

    # --- run -----------------------------------------------------------------------------------------------

    def test_run(
        self, data: bytes = b"", context: bytes = b"", repeat: int = 1, flags: int = 0
    ) -> tuple[int, bytes]:
        """Run the program by BPF_PROG_TEST_RUN: (its return value, the data after it)."""
        out = c.create_string_buffer(len(data) + 4096) if data else None
        opts = libbpf.TestRunOpts(sz=c.sizeof(libbpf.TestRunOpts), repeat=repeat if data else 0, flags=flags)
        data_in, context_in = c.create_string_buffer(data), c.create_string_buffer(context)
        if out is not None:
            opts.data_in, opts.data_size_in = c.addressof(data_in), len(data)
            opts.data_out, opts.data_size_out = c.addressof(out), len(out)
        if context:
            opts.ctx_in, opts.ctx_size_in = c.addressof(context_in), len(context)
        result = libbpf.library().bpf_prog_test_run_opts(self.fd, c.byref(opts))
        check(result, "bpf_prog_test_run_opts", self.name)
        return int(opts.retval), out.raw[: opts.data_size_out] if out is not None else b""

    # --- pins ----------------------------------------------------------------------------------------------

    def pin(self, path: Path) -> None:
        """Pin on bpffs."""
        fs.pin(self.fd, path, f"program {self.name}")
        self._pin = path

    def unpin(self) -> None:
        """Remove the pin made by pin(), or the one it was opened from."""
        if self._pin is not None:
            fs.unpin(self._pin)
            self._pin = None
