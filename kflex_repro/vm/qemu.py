"""QEMU: its command line, its life. The one module that starts it.

A guest's parts reach QEMU as inherited descriptors (disks, initramfs, serial lines, the file server's
socket), and QEMU ends with the thread that started it: whatever end that takes, no file, socket or process
of it stays.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from kflex_repro import capabilities, files
from kflex_repro.build import cache, toolchain
from kflex_repro.errors import KflexError, Unavailable

PROGRAM = "qemu-system-x86_64"
KVM = Path("/dev/kvm")
_VIRTIOFSD = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")
_PR_SET_PDEATHSIG = 1
_CLONE_NEWNS = 0x20000
_MS_REC_PRIVATE = 0x44000
_MOUNT_SETATTR = 442
_AT_RECURSIVE = 0x8000
_MOUNT_ATTR_RDONLY = 1
# CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, SETPCAP, SYS_CHROOT, MKNOD, SETFCAP: virtiofsd ends
# without one of them. A container has them by default.
_FILE_SERVER_CAPABILITIES = sum(1 << bit for bit in (0, 1, 3, 4, 6, 7, 8, 18, 27, 31))
_ENDS_US = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Disk:
    """An NVMe disk: the guest knows it by its ``serial``, QEMU by the descriptor."""

    serial: str
    fd: int
    readonly: bool = False


@dataclass(frozen=True)
class Wish:
    """A machine: ``memory`` in bytes, ``serials`` lines besides the console, ``share`` the host's root."""

    image: Path
    initramfs: int
    disks: tuple[Disk, ...]
    append: str
    memory: int
    cpus: int
    serials: int = 3
    share: bool = False


def program() -> toolchain.Tool:
    """QEMU for x86-64; Unavailable where it is not installed."""
    path = os.environ.get("KFLEX_QEMU") or shutil.which(PROGRAM)
    tool = toolchain.probe("QEMU", path) if path else None
    if tool is None:
        raise Unavailable("no working QEMU found", path or PROGRAM, "apt install qemu-system-x86")
    return tool


def file_server() -> str | None:
    """virtiofsd, the C one of QEMU 7 or the Rust one; None where there is none."""
    return next((path for path in _VIRTIOFSD if os.access(path, os.X_OK)), None)


def accelerators(wanted: str, note: Callable[[str], None]) -> tuple[str, ...]:
    """What to try, in order. KVM that did not work since the host was booted is not tried again."""
    if wanted != "auto":
        if wanted == "kvm" and not os.access(KVM, os.R_OK | os.W_OK):
            raise Unavailable("KVM cannot be used", _kvm_reason(), "--accel tcg")
        return (wanted,)
    if not os.access(KVM, os.R_OK | os.W_OK):
        note(f"no KVM ({_kvm_reason()}): the guest is emulated (TCG), and slow")
        return ("tcg",)
    if kvm_has_failed():
        note("KVM cannot run the guest on this host: it is emulated (TCG), and slow")
        return ("tcg",)
    return ("kvm", "tcg")


def kvm_failed() -> None:
    """Remember, until the host is booted again, that guests do not run under KVM here."""
    _kvm_verdict().parent.mkdir(exist_ok=True)
    _kvm_verdict().touch()


def kvm_has_failed() -> bool:
    """Whether that was found since the host was booted."""
    return _kvm_verdict().exists()


def _kvm_verdict() -> Path:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return cache.root() / "vm" / f"no-kvm-{boot}"


def _kvm_reason() -> str:
    if not KVM.exists():
        return f"there is no {KVM}"
    return f"{KVM} may not be opened"


def _dies_with_us() -> Callable[[], None]:
    """What a child does before it becomes another program."""
    parent = os.getpid()

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDS_US)
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def _with_own_mounts() -> Callable[[], None]:
    """The same, for the file server."""
    prepare = _dies_with_us()

    def confine() -> None:
        prepare()
        # What is shared with a guest must not be writable for it, though it is root there. Without
        # CAP_SYS_ADMIN the guest's own read-only mount is all there is.
        if _libc.unshare(_CLONE_NEWNS) == 0:
            _libc.mount(b"none", b"/", None, _MS_REC_PRIVATE, None)
            attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY, 0, 0, 0)
            _libc.syscall(_MOUNT_SETATTR, -100, b"/", _AT_RECURSIVE, ctypes.byref(attributes), 32)

    return confine


def can_share() -> bool:
    """Whether the host's root can be shared with a guest: a file server is there, and has what it wants.

    An ordinary user's virtiofsd would work in a user namespace, but not below an overlay: that opens files
    with O_NOATIME, which only their owner may.
    """
    if file_server() is None or os.geteuid() != 0:
        return False
    return not _FILE_SERVER_CAPABILITIES & ~capabilities.effective()


class Machine:
    """A running QEMU. ``console`` and ``lines`` are the host's ends of the guest's serial lines."""

    def __init__(self, wish: Wish, accel: str) -> None:
        self.accel = accel
        self._wish = wish
        self._children: list[subprocess.Popen[bytes]] = []
        self._errors = files.in_memory("qemu-errors")
        self.console: socket.socket
        self.lines: tuple[socket.socket, ...] = ()
        self._ours: list[socket.socket] = []

    def __enter__(self) -> Machine:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self) -> None:
        wish = self._wish
        theirs: list[int] = []
        closing: list[socket.socket] = []
        try:
            serial: list[str] = []
            for number in range(1 + wish.serials):
                here, there = socket.socketpair()
                self._ours.append(here)
                closing.append(there)
                theirs.append(there.fileno())
                serial += ["-chardev", f"socket,id=line{number},fd={there.fileno()}"]
                serial += ["-device", f"isa-serial,chardev=line{number},index={number}"]
            self.console, self.lines = self._ours[0], tuple(self._ours[1:])
            share: list[str] = []
            if wish.share:
                connected = self._serve()
                closing.append(connected)
                theirs.append(connected.fileno())
                share += ["-object", f"memory-backend-memfd,id=memory,size={wish.memory},share=on"]
                share += ["-numa", "node,memdev=memory"]
                share += ["-chardev", f"socket,id=share,fd={connected.fileno()}"]
                share += ["-device", "vhost-user-fs-pci,chardev=share,tag=host"]
            disks: list[str] = []
            for number, disk in enumerate(wish.disks):
                opened = f"driver=file,filename=/dev/fdset/{number},node-name=file{number},cache.no-flush=on"
                flag = "on" if disk.readonly else "off"
                disks += ["-add-fd", f"fd={disk.fd},set={number}"]
                disks += ["-blockdev", f"{opened},read-only={flag},locking=off"]
                disks += [
                    "-blockdev",
                    f"driver=raw,file=file{number},node-name=disk{number},read-only={flag}",
                ]
                disks += ["-device", f"nvme,drive=disk{number},serial={disk.serial}"]
                theirs.append(disk.fd)
            theirs.append(wish.initramfs)
            command = [
                program().path,
                *("-M", "q35", *_acceleration(self.accel)),
                *("-m", f"{wish.memory >> 20}M", "-smp", str(wish.cpus)),
                *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
                *(*share, *serial, *disks),
                *("-kernel", str(wish.image), "-initrd", f"/proc/self/fd/{wish.initramfs}"),
                *("-append", wish.append),
            ]
            self._spawn(command, theirs)
        finally:
            for one in closing:
                one.close()

    def _serve(self) -> socket.socket:
        """Start virtiofsd on the host's root; the connection to it."""
        path = file_server()
        if path is None:
            raise Unavailable("no virtiofsd found", "", "apt install qemu-system-common (or virtiofsd)")
        with socket.socket(socket.AF_UNIX) as listener:
            # An abstract name: there is no file to leave behind.
            listener.bind("")
            listener.listen(1)
            rust = path.startswith("/usr/libexec")
            options = (
                ["--shared-dir", "/", "--sandbox", "chroot", "--cache", "always"]
                if rust
                else ["-o", "source=/", "-o", "sandbox=chroot", "-o", "cache=always", "-o", "log_level=err"]
            )
            command = [path, f"--fd={listener.fileno()}", *options]
            self._spawn(command, [listener.fileno()], _with_own_mounts())
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(listener.getsockname())
        return connection

    def _spawn(
        self, command: Sequence[str], fds: Sequence[int], prepare: Callable[[], None] | None = None
    ) -> None:
        # With a preexec_fn Python runs its hooks for forks, and drops what a signal's handler raises there.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS_US)
        try:
            self._children.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=self._errors,
                    stderr=self._errors,
                    pass_fds=fds,
                    # setpriv --pdeathsig leaves a gap: it does not look whether the parent is gone already.
                    preexec_fn=prepare or _dies_with_us(),  # noqa: PLW1509
                    # Ctrl-C is for us: we take them down in order.
                    start_new_session=True,
                )
            )
        except OSError as error:
            raise KflexError(f"cannot start {command[0]}, {error.strerror}") from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def errors(self) -> str:
        """What QEMU and the file server said."""
        text = os.pread(self._errors.fileno(), 1 << 16, 0).decode(errors="replace")
        lines = [line for line in text.splitlines() if "Unexpected poll revents" not in line]
        return re.sub(r"\s+", " ", " | ".join(line for line in lines if line.strip())[:600])

    def broken(self) -> bool:
        """Whether KVM gave up on the guest (QEMU then stays, paused)."""
        return self.accel == "kvm" and "KVM internal error" in self.errors()

    def stop(self) -> None:
        """End QEMU and the file server, at once."""
        for child in reversed(self._children):
            if child.poll() is None:
                child.kill()
            child.wait()
        for one in self._ours:
            one.close()
        self._errors.close()


def _acceleration(accel: str) -> tuple[str, ...]:
    if accel == "kvm":
        return ("-accel", "kvm", "-cpu", "host")
    # Multi-threaded TCG oopses now and then at int3 (kprobes, static calls); single-threaded is no slower.
    return ("-accel", "tcg,thread=single", "-cpu", "max")
