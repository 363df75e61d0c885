"""Run a command as root in a small virtual machine: its kernel, root, output, files and exit status."""

from __future__ import annotations

import contextlib
import os
import re
import select
import selectors
import shlex
import shutil
import socket
import tarfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kflex_repro.build import cache, objects
from kflex_repro.errors import KflexError, Unavailable
from kflex_repro.vm import image, kernels, keyboard, qemu, rootfs
from kflex_repro.vm.kernels import Kernel

Root = Literal["auto", "virtiofs", "image", "none"]
Sink = Callable[[bytes], None]
Note = Callable[[str], None]

# Sparse: what the guest does not write takes no space.
_SCRATCH = 16 << 30
_OUT = 4 << 30
# Until the guest's init says so (s). KVM on a host that has it takes one; TCG three, on two quiet cores.
_BOOT_SECONDS = {"kvm": 40.0, "tcg": 180.0}
_KEPT_LOGS = 20
_BTF_KIND = "vm-btf"
_TAIL = 6
_OOPS = re.compile(rb"Kernel panic|Oops:|BUG: unable to handle|kernel BUG at|general protection fault")
_APPEND = "console=ttyS0 8250.nr_uarts=4 panic=-1 mitigations=off random.trust_cpu=on"
# Which tools and sources: what was built here with them is only found there with the same.
_TOOLS = (
    "CC",
    "KFLEX_BPFTOOL",
    "KFLEX_CLANG",
    "KFLEX_LIBBPF",
    "KFLEX_PERF",
    "KFLEX_REDIS_BENCHMARK",
    "KFLEX_REDIS_SERVER",
    "KFLEX_SOURCE",
)
_PATH = "/run/kflex-vm/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def _nothing(_line: str) -> None:
    pass


def _drop(_data: bytes) -> None:
    pass


@dataclass(frozen=True)
class Request:
    """A command and the guest it wants. ``kernel`` is a spec or what was found; ``memory`` in bytes,
    ``timeout`` in s over all; ``out`` takes the files that the command wrote to $KFLEX_OUT. ``root``:
    "virtiofs" the host's own, "image" one made of the host's packages, our sources and the files and
    directories of ``take``; "none" only busybox.
    """

    command: tuple[str, ...]
    kernel: str | Kernel = kernels.STOCK
    memory: int = 2 << 30
    cpus: int = 2
    accel: str = "auto"
    timeout: float = 600.0
    root: Root = "auto"
    cwd: Path | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    out: Path | None = None
    take: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What came of it: the command's ``status``, seconds from QEMU's start to the command's and in all."""

    status: int
    accel: str
    kernel: Kernel
    root: str
    boot_seconds: float
    seconds: float
    console: Path
    files: tuple[str, ...]

    @property
    def emulated(self) -> bool:
        """Whether the guest's CPU was emulated: its times then say nothing."""
        return self.accel == "tcg"


class GuestError(KflexError):
    """The guest did not do it: it panicked, hung, or never came up. ``early``: before its init spoke."""

    early = False


def btf(kernel: Kernel, note: Note = _nothing, accel: str = "auto") -> Path:
    """A kernel's BTF, read from it once by booting it, in the cache."""

    def make(out: Path) -> None:
        note(f"reading the BTF of {kernel.release}")
        copy = ("/bin/busybox", "cp", "/sys/kernel/btf/vmlinux", "/run/kflex-vm/out/vmlinux")
        request = Request(copy, kernel, memory=1 << 30, cpus=1, accel=accel, root="none", out=out)
        if run(request, note=note).status != 0 or not (out / "vmlinux").exists():
            raise KflexError("the kernel has no BTF", kernel.release, "use one with CONFIG_DEBUG_INFO_BTF=y")

    place, _ = cache.obtain(_BTF_KIND, kernel.key, make)
    return place / "vmlinux"


def prepare(
    kernel: Kernel, note: Note = _nothing, report: objects.Report = lambda _name, _state, _seconds: None
) -> objects.Built:
    """Build, here, the BPF objects that ``build.ensure()`` looks for in a guest of this kernel."""
    return objects.ensure(btf=btf(kernel, note), report=report)


def run(
    request: Request,
    stdout: Sink = _drop,
    stderr: Sink = _drop,
    note: Note = _nothing,
    keyboard: Callable[[], bytes] | None = None,
    progress: rootfs.Progress = rootfs.quiet,
    disks: tuple[Path, ...] | None = None,
) -> Outcome:
    """Boot, run, power off. KflexError in one line for a guest that panics, hangs or never comes up.

    With a ``keyboard`` (it blocks for what is typed; b"" is the end) the command has a terminal. ``disks``
    are what layers() made, where that was done before.
    """
    kernel = request.kernel
    if isinstance(kernel, str):
        kernel = kernels.find(kernel, note)
    qemu.program()
    root = _root(request.root)
    if disks is None:
        disks = layers(request, kernel, progress)
    if root == "image" and request.cwd and not _taken(request.cwd, request.take):
        note(f"the guest has an image for its root, without the files of {request.cwd} (--take . adds them)")
    tries = [*qemu.accelerators(request.accel, note)]
    deadline = time.monotonic() + request.timeout
    again = True
    while True:
        accel = tries[0]
        try:
            with _Guest(request, kernel, root, disks, accel, keyboard) as guest:
                return guest.run(deadline, stdout, stderr)
        except GuestError as error:
            if not error.early or time.monotonic() > deadline - 1:
                raise
            if accel == "kvm" and len(tries) > 1:
                qemu.kvm_failed()
                note(f"KVM cannot run the guest here ({error.what}): it is emulated (TCG), and slow")
                tries.pop(0)
            elif again:
                again = False
                note(f"{error.what}; trying once more")
            else:
                raise


def _root(wanted: Root) -> str:
    if wanted == "virtiofs" and not qemu.can_share():
        raise Unavailable(
            "the host's root cannot be shared with a guest",
            "not root, or root without the capabilities that virtiofsd wants"
            if qemu.file_server()
            else "no virtiofsd",
            "--root image" if qemu.file_server() else "apt install qemu-system-common (or virtiofsd)",
        )
    if wanted == "auto":
        return "virtiofs" if qemu.can_share() else "image"
    return wanted


def _taken(directory: Path, take: tuple[Path, ...]) -> bool:
    return any(
        directory.resolve().is_relative_to(place.resolve()) for place in (objects.source_root(), *take)
    )


def layers(request: Request, kernel: Kernel, progress: rootfs.Progress = rootfs.quiet) -> tuple[Path, ...]:
    """The images that the guest's root is made of, the uppermost first; none where it is not of images."""
    if _root(request.root) != "image":
        return ()
    return rootfs.images((*_objects(kernel), *request.take), progress)


def _objects(kernel: Kernel) -> list[Path]:
    """The cache's entries for guests of this kernel, if it was prepared."""
    known = cache.root() / _BTF_KIND / kernel.key
    if not cache.intact(known):
        return []
    built = objects.ensure(btf=known / "vmlinux")
    return [known, *(step.path.parent for step in built.steps)]


def _job(request: Request, root: str, disks: tuple[str, ...]) -> dict[str, str]:
    """The files that init.sh reads."""
    env = {"PATH": _PATH, "HOME": "/root", "LANG": "C.UTF-8", "TMPDIR": "/run/kflex-vm/tmp"}
    env |= {name: os.environ[name] for name in _TOOLS if name in os.environ}
    env |= request.env
    env.setdefault("KFLEX_CACHE", str(cache.root()))
    lines = [f"export {name}={shlex.quote(value)}" for name, value in env.items()]
    where = shlex.quote(str(request.cwd or "/"))
    if root == "none":
        command = f"exec {shlex.join(request.command)}\n"
    else:
        # An image may not have it: it is then empty.
        command = f"mkdir -p {where} && cd {where} || cd /\nexec {shlex.join(request.command)}\n"
    return {"kind": root, "lower": " ".join(disks), "env": "\n".join(lines) + "\n", "command": command}


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise KflexError(f"cannot open an image, {error.strerror}", str(path)) from None


class _Guest:
    """One boot. Everything it opened is closed with it."""

    def __init__(
        self,
        request: Request,
        kernel: Kernel,
        root: str,
        layers: tuple[Path, ...],
        accel: str,
        keyboard: Callable[[], bytes] | None,
    ) -> None:
        self._request, self._kernel, self._root, self._accel = request, kernel, root, accel
        self._layers, self._keyboard = layers, keyboard
        self._left = False
        self._stack = contextlib.ExitStack()
        self._console = bytearray()
        self._control = bytearray()
        self._status: int | None = None
        self._ready: float | None = None
        self._booted = False
        self._failed = ""

    def __enter__(self) -> _Guest:
        try:
            self._started = time.monotonic()
            self.log = _new_log()
            self._log = self._stack.enter_context(self.log.open("wb"))
            disks, lower = self._disks()
            job = _job(self._request, self._root, lower)
            if self._keyboard:
                job["terminal"] = ""
            initramfs = self._keep(image.initramfs(self._kernel, job))
            wish = qemu.Wish(
                image=self._kernel.image,
                initramfs=initramfs,
                disks=disks,
                append=_APPEND,
                memory=self._request.memory,
                cpus=self._request.cpus,
                share=self._root == "virtiofs",
            )
            self._machine = self._stack.enter_context(qemu.Machine(wish, self._accel))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def _keep(self, fd: int) -> int:
        self._stack.callback(os.close, fd)
        return fd

    def _disks(self) -> tuple[tuple[qemu.Disk, ...], tuple[str, ...]]:
        """The disks, and the names of those that are layers of the guest's root, the uppermost first."""
        self._out = self._keep(image.unnamed(_OUT))
        disks = [qemu.Disk("out", self._out)]
        if self._root == "none":
            return tuple(disks), ()
        disks.append(qemu.Disk("scratch", self._keep(image.scratch(_SCRATCH))))
        if (modules := image.modules_disk(self._kernel)) is not None:
            disks.append(qemu.Disk("modules", self._keep(_open(modules)), readonly=True))
        disks += [qemu.Disk(layer.stem, self._keep(_open(layer)), readonly=True) for layer in self._layers]
        return tuple(disks), tuple(layer.stem for layer in self._layers)

    def run(self, deadline: float, stdout: Sink, stderr: Sink) -> Outcome:
        """Until the guest is off; GuestError if it does not come to that."""
        boot_deadline = self._started + _BOOT_SECONDS[self._accel]
        out, err, control = self._machine.lines
        sinks: dict[socket.socket, Sink] = {
            self._machine.console: self._see_console,
            out: stdout,
            err: stderr,
            control: self._see_control,
        }
        with selectors.DefaultSelector() as selector:
            for line in sinks:
                line.setblocking(False)
                selector.register(line, selectors.EVENT_READ)
            if self._keyboard:
                keyboard.feed(self._keyboard, lambda data: _type(out, data), self._leave)
            while selector.get_map():
                now = time.monotonic()
                if now > deadline:
                    raise self._error(f"the guest was not done within {self._request.timeout:g} s")
                if not self._booted and now > boot_deadline:
                    raise self._error("the guest did not come up")
                if self._left:
                    raise KeyboardInterrupt
                if self._machine.broken():
                    raise self._error("KVM internal error")
                for key, _ in selector.select(0.5):
                    assert isinstance(key.fileobj, socket.socket)
                    if not _pump(key.fileobj, sinks[key.fileobj]):
                        selector.unregister(key.fileobj)
        if self._failed:
            raise self._error(self._failed)
        if self._status is None:
            raise self._error(self._why())
        files = self._files()
        ready = self._ready if self._ready is not None else time.monotonic()
        return Outcome(
            status=self._status,
            accel=self._accel,
            kernel=self._kernel,
            root=self._root,
            boot_seconds=ready - self._started,
            seconds=time.monotonic() - self._started,
            console=self.log,
            files=files,
        )

    def _leave(self) -> None:
        self._left = True

    def _see_console(self, data: bytes) -> None:
        self._log.write(data)
        self._log.flush()
        self._console += data
        del self._console[: -(1 << 16)]

    def _see_control(self, data: bytes) -> None:
        self._control += data
        while b"\n" in self._control:
            line, _, self._control = self._control.partition(b"\n")
            word, _, rest = line.decode(errors="replace").strip().partition(" ")
            if word == "booted":
                self._booted = True
            elif word == "ready":
                self._ready = time.monotonic()
            elif word == "status":
                self._status = int(rest)
            elif word == "failed":
                self._failed = f"the guest gave up: {rest}"

    def _why(self) -> str:
        if match := _OOPS.search(self._console):
            line = bytes(self._console[match.start() :]).split(b"\n", 1)[0]
            return f"the guest's kernel ended: {line.decode(errors='replace').strip()}"
        if not self._booted and not self._console and self._machine.errors():
            return f"QEMU ended: {self._machine.errors()}"
        return "the guest went off before the command ended" if self._booted else "the guest never came up"

    def _error(self, what: str) -> GuestError:
        # What a kernel says of its end comes first, registers follow.
        ended = _OOPS.search(self._console)
        text = self._console[ended.start() :] if ended else self._console
        lines = [line.strip() for line in text.decode(errors="replace").splitlines() if line.strip()]
        last = lines[:_TAIL] if ended else lines[-_TAIL:]
        tail = " | ".join(last) or self._machine.errors() or "its console is empty"
        error = GuestError(what, f"its last lines: {tail}", f"the whole console is {self.log}")
        error.early = not self._booted or (self._ready is None and bool(_OOPS.search(self._console)))
        return error

    def _files(self) -> tuple[str, ...]:
        """Unpack what the guest left on its "out" disk."""
        if self._request.out is None:
            return ()
        # QEMU's descriptor and ours share the position.
        os.lseek(self._out, 0, os.SEEK_SET)
        with (
            os.fdopen(os.dup(self._out), "rb") as stream,
            contextlib.suppress(tarfile.ReadError),  # an empty disk: the guest wrote nothing
            tarfile.open(fileobj=stream, mode="r:") as archive,
        ):
            members = [one for one in archive if one.isfile()]
            for one in members:
                _unpack(archive, one, self._request.out)
            return tuple(one.name.removeprefix("./") for one in members)
        return ()


def _unpack(archive: tarfile.TarFile, member: tarfile.TarInfo, out: Path) -> None:
    """One file below ``out``, whatever the guest calls it; not extractall(): the filters came with 3.11.4."""
    place = out / member.name
    if ".." in place.parts or member.name.startswith("/"):
        raise KflexError("the guest's files leave their directory", member.name)
    place.parent.mkdir(parents=True, exist_ok=True)
    content = archive.extractfile(member)
    assert content is not None
    # A link that lies there would be written through.
    place.unlink(missing_ok=True)
    with place.open("wb") as stream:
        shutil.copyfileobj(content, stream)
    place.chmod(0o755 if member.mode & 0o100 else 0o644)


def _type(line: socket.socket, data: bytes) -> None:
    while data:
        _, ready, _ = select.select([], [line], [])
        data = data[line.send(data) :] if ready else data


def _pump(line: socket.socket, sink: Sink) -> bool:
    """Pass on what is there; whether more may come."""
    try:
        data = line.recv(1 << 16)
    except BlockingIOError:
        return True
    except OSError:
        return False
    if data:
        sink(data)
    return bool(data)


def _new_log() -> Path:
    directory = cache.root() / "logs"
    directory.mkdir(exist_ok=True)
    old = sorted(directory.glob("vm-2*.log"))
    for path in old[: -_KEPT_LOGS + 1]:
        path.unlink(missing_ok=True)
    return directory / f"vm-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.getpid()}.log"
