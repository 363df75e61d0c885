"""`vm run` and `vm shell`: what a guest gives back, and what is said and left when it does not work."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kflex_repro.build import cache
from kflex_repro.errors import KflexError, Unavailable
from kflex_repro.vm import kernels, qemu, run
from tests.conftest import require, unavailable
from tests.vm.conftest import bzimage
from tests.vm.leftovers import Watch

Fake = Callable[[str], Callable[[], list[str]]]
Done = subprocess.CompletedProcess[str]
_VM = [sys.executable, "-m", "kflex_repro", "vm"]
_TCG = ["--accel", "tcg"]


def _vm(*arguments: str | Path, env: dict[str, str] | None = None) -> Done:
    command = [*_VM, *map(str, arguments)]
    return subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240, check=False
    )


def _one_line(done: Done, *words: str, status: int = 1) -> None:
    """The command failed in a last line that says all of ``words``, and with no traceback."""
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("kflex-repro: ")
    for word in words:
        assert word in last


# --- real guests ------------------------------------------------------------------------------------------


def test_a_command_in_a_guest_is_as_here_and_its_files_come_back(
    stock: kernels.Kernel, tmp_path: Path
) -> None:
    require("root")
    if not qemu.can_share():
        unavailable("virtiofsd is not there, or not allowed what it wants")
    del stock
    watch = Watch(tmp_path / "tmp", cache.root())
    (tmp_path / "mine").write_text("from the host\n")
    script = (
        'echo one; cat mine; pwd; echo "vm $KFLEX_VM id $(id -u)"; '
        'mkdir $KFLEX_OUT/deep; echo kept >$KFLEX_OUT/deep/file; printf "#!/bin/sh\\n" >$KFLEX_OUT/tool; '
        "chmod +x $KFLEX_OUT/tool; ln -s /etc/passwd $KFLEX_OUT/link; "
        "echo guest >mine; echo guest >new; cat mine >&2; "
        "modprobe veth && ip link add name v0 type veth peer name v1 && ls /sys/class/net; exit 7"
    )
    options = [*_TCG, "--root", "virtiofs", "--out", str(tmp_path / "out")]
    with subprocess.Popen(
        [*_VM, "run", *options, "--", "sh", "-c", script],
        cwd=tmp_path,
        env={**watch.env, "PYTHONPATH": str(Path.cwd())},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "one\n"
        # Streamed: the guest was still there.
        assert process.poll() is None
        rest, errors = process.stdout.read(), process.stderr.read()
    assert rest.splitlines() == ["from the host", str(tmp_path), "vm 1 id 0", "lo", "v0", "v1"]
    assert "guest" in errors.splitlines()
    assert process.returncode == 7
    assert (tmp_path / "out/deep/file").read_text() == "kept\n"
    assert os.access(tmp_path / "out/tool", os.X_OK)
    assert not (tmp_path / "out/link").exists()
    # What the guest wrote elsewhere stayed in the guest.
    assert (tmp_path / "mine").read_text() == "from the host\n"
    assert not (tmp_path / "new").exists()
    watch.nothing_left()


def test_a_panic_ends_the_run_with_the_console(stock: kernels.Kernel) -> None:
    trigger = ("/bin/busybox", "sh", "-c", "echo c >/proc/sysrq-trigger")
    request = run.Request(trigger, stock, accel="tcg", root="none", memory=512 << 20, cpus=1, timeout=120)
    with pytest.raises(run.GuestError) as failed:
        run.run(request)
    assert "the guest's kernel ended: Kernel panic - not syncing: sysrq triggered crash" in failed.value.what
    assert "CPU: 0" in failed.value.where
    log = Path(failed.value.fix.rpartition(" ")[2])
    assert b"sysrq triggered crash" in log.read_bytes()


def test_a_shell_has_a_terminal(stock: kernels.Kernel, tmp_path: Path) -> None:
    require("root")
    del stock
    watch = Watch(tmp_path / "tmp", cache.root())
    # Not this user's start-up files: emulated, they may take half a minute.
    with _on_a_terminal([*_VM, "shell", *_TCG, "--env", "HOME=/run"], watch.env) as (process, terminal):
        _until(terminal, b"# ")
        os.write(terminal, b"test -t 0 && echo $((6 * 7))terminal; exit 3\n")
        _until(terminal, b"42terminal")
        _drain(terminal)
        assert process.wait(60) == 3
    watch.nothing_left()


@pytest.mark.parametrize("moment", ["booting", "running"])
def test_kill_takes_a_real_guest_along(stock: kernels.Kernel, tmp_path: Path, moment: str) -> None:
    del stock
    watch = Watch(tmp_path / "tmp", cache.root())
    command = [*_VM, "run", *_TCG, "--", "sh", "-c", "echo here; exec sleep 100"]
    process = subprocess.Popen(command, env=watch.env, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        if moment == "running":
            assert process.stdout.readline() == b"here\n"
        else:
            _eventually(lambda: any("qemu-system" in text for text in watch.processes().values()))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]
    watch.nothing_left()


# --- guests that only seem to be --------------------------------------------------------------------------


def _request(kernel: Path, timeout: float = 60, accel: str = "tcg") -> run.Request:
    return run.Request(("true",), kernel=str(kernel), accel=accel, root="none", timeout=timeout)


def test_output_and_status_are_the_guests(fake: Fake, kernel_file: Path) -> None:
    fake("answers")
    out, err = bytearray(), bytearray()
    outcome = run.run(_request(kernel_file), out.extend, err.extend)
    assert (outcome.status, bytes(out), bytes(err)) == (7, b"out\n", b"err\n")
    assert outcome.emulated and outcome.console.read_bytes().startswith(b"Linux version")


@pytest.mark.parametrize(
    ("guest", "what", "tail", "starts"),
    [
        ("panics", "the guest's kernel ended: BUG: unable to handle page fault", "Fatal exception", 1),
        ("oops", "the guest's kernel ended: Kernel panic - not syncing: int3", "int3", 2),
        ("gives up", "the guest gave up: the overlay cannot be mounted", "first things first", 1),
        ("goes off", "the guest went off before the command ended", "first things first", 1),
        ("refuses", "QEMU ended: qemu: it does not like its command line", "command line", 2),
    ],
)
def test_a_guest_that_fails_is_one_line_with_its_last(
    fake: Fake, kernel_file: Path, guest: str, what: str, tail: str, starts: int
) -> None:
    started = fake(guest)
    with pytest.raises(run.GuestError) as failed:
        run.run(_request(kernel_file))
    assert failed.value.what == what
    assert tail in failed.value.where
    assert "\n" not in str(failed.value)
    assert started() == ["tcg"] * starts


@pytest.mark.parametrize(("guest", "tail"), [("silent", "its console is empty"), ("hangs", "the last line")])
def test_a_guest_that_hangs_ends_within_the_timeout(
    fake: Fake, kernel_file: Path, guest: str, tail: str
) -> None:
    started = fake(guest)
    with pytest.raises(run.GuestError) as failed:
        run.run(_request(kernel_file, timeout=1.5))
    assert failed.value.what == "the guest was not done within 1.5 s"
    assert tail in failed.value.where
    assert started() == ["tcg"]


def test_one_oops_while_booting_is_tried_once_more(fake: Fake, kernel_file: Path) -> None:
    started = fake("oops once")
    notes: list[str] = []
    assert run.run(_request(kernel_file), note=notes.append).status == 7
    assert started() == ["tcg", "tcg"]
    assert any("trying once more" in note for note in notes)


def test_kvm_that_breaks_is_said_once_and_remembered(
    fake: Fake, kernel_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = tmp_path / "kvm"
    device.touch()
    monkeypatch.setattr(qemu, "KVM", device)
    started = fake("kvm breaks")
    notes: list[str] = []
    request = _request(kernel_file, accel="auto")
    outcome = run.run(request, note=notes.append)
    assert outcome.accel == "tcg" and outcome.status == 7
    assert started() == ["kvm", "tcg"]
    assert len([note for note in notes if "emulated (TCG)" in note]) == 1
    run.run(request, note=notes.append)
    assert started() == ["kvm", "tcg", "tcg"]
    with pytest.raises(run.GuestError, match="KVM internal error"):
        run.run(_request(kernel_file, accel="kvm"))


def test_without_the_right_to_kvm_the_guest_is_emulated(
    public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("root")
    device = public / "kvm"
    device.touch(0o600)
    monkeypatch.setattr(qemu, "KVM", device)

    def ask() -> str:
        notes: list[str] = []
        tried = qemu.accelerators("auto", notes.append)
        return f"{tried} {notes}"

    said = _as_nobody(ask)
    assert said.startswith("('tcg',)")
    assert "may not be opened" in said and "emulated (TCG)" in said
    assert "may not be opened" in _as_nobody(lambda: qemu.accelerators("kvm", print))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_no_moment_to_end_it_leaves_anything(
    fake: Fake, kernel_file: Path, tmp_path: Path, users_cache: Path, number: signal.Signals
) -> None:
    fake("hangs")
    # The boot archive is made, so that what is new in the cache is of the run.
    with pytest.raises(run.GuestError):
        run.run(_request(kernel_file, timeout=1))
    command = [*_VM, "run", *_TCG, "--kernel", str(kernel_file), "--", "true"]
    # An ordinary user's guest has images, of 1.2 GB, which all tests share.
    own = qemu.can_share()
    watch = Watch(tmp_path / "tmp", tmp_path / "cache" if own else users_cache, own)
    untouched = watch.temporary.stat().st_mtime_ns
    started = time.monotonic()
    process = subprocess.Popen(command, env=watch.env, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"so far\n"
    whole = time.monotonic() - started
    _end(process, number)
    watch.nothing_left()
    # What was there for a moment would be left when it ends in that moment.
    assert watch.temporary.stat().st_mtime_ns == untouched
    for part in (0.3, 0.6, 0.75, 0.85, 0.95):
        process = subprocess.Popen(command, env=watch.env, stdout=subprocess.PIPE)
        # Not to wait for anything: the moments are to be spread over the start.
        time.sleep(whole * part)
        _end(process, number)
        watch.nothing_left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_moment_of_a_fork_is_not_lost(
    fake: Fake, kernel_file: Path, number: signal.Signals
) -> None:
    fake("hangs")
    script = (
        "import os, sys\n"
        "from kflex_repro.cli import main\n"
        f"os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), {int(number)}))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = ["vm", "run", *_TCG, "--kernel", str(kernel_file), "--", "true"]
    done = subprocess.run([sys.executable, "-c", script, *words], check=False, timeout=60)
    assert done.returncode == 128 + number


def _end(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    process.send_signal(number)
    status = process.wait(20)
    assert process.stdout is not None
    process.stdout.close()
    # Before Python has our handlers it dies of the signal.
    assert status in (-number, 128 + number), status


# --- what is not there ------------------------------------------------------------------------------------


def test_no_qemu(fake: Fake, kernel_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("answers")
    monkeypatch.setenv("KFLEX_QEMU", "/nowhere/qemu")
    done = _vm("run", "--kernel", kernel_file, "--", "true")
    _one_line(done, "no working QEMU found", "/nowhere/qemu", "apt install qemu-system-x86", status=3)


@pytest.mark.parametrize(
    ("listed", "spec", "words"),
    [
        ("", "stock", ("no kernel package is known to apt", "apt-get update")),
        (
            "linux-image-6.1.0-9-cloud-amd64 - Linux",
            "9.9",
            ("the distribution has no kernel 9.9", "it has: 6.1"),
        ),
    ],
)
def test_no_kernel_package(
    fake: Fake,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    listed: str,
    spec: str,
    words: tuple[str, ...],
) -> None:
    fake("answers")
    apt = tmp_path / "bin" / "apt-cache"
    apt.parent.mkdir()
    apt.write_text(f"#!/bin/sh\necho '{listed}'\n")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{apt.parent}:{os.environ['PATH']}")
    _one_line(_vm("run", "--kernel", spec, "--", "true"), *words, status=3)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\0" * 0x38 + b"RSC\x05" + b"\0" * 0x1000, "a kernel for riscv64"),
        (b"\0" * 0x38 + b"ARM\x64" + b"\0" * 0x1000, "a kernel for aarch64"),
        (b"\x7fELF" + b"\0" * 0x1000, "an ELF vmlinux"),
        (bzimage(sixty_four=False), "a kernel for i686"),
        (b"", "not a kernel image"),
        (b"#!/bin/sh\n", "not a kernel image"),
    ],
)
def test_images_of_other_machines(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "Image"
    path.write_bytes(content)
    with pytest.raises(KflexError, match=what):
        kernels.find(str(path))


def test_a_host_of_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.platform, "machine", lambda: "aarch64")
    with pytest.raises(Unavailable, match="no VM for aarch64 yet"):
        kernels.find("stock")


def test_an_unreadable_image(tmp_path: Path, public: Path) -> None:
    require("root")
    image = public / "bzImage"
    image.write_bytes(bzimage())
    image.chmod(0)
    said = _as_nobody(lambda: kernels.find(str(image)))
    assert "cannot read the kernel image, Permission denied" in said
    with pytest.raises(KflexError, match="no such kernel"):
        kernels.find(str(tmp_path / "gone"))
    with pytest.raises(KflexError, match="no kernel image in the directory"):
        kernels.find(str(tmp_path))


def test_no_space_is_said_before_anything_is_written(tmp_path: Path, fake: Fake, kernel_file: Path) -> None:
    require("root")
    fake("answers")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", small], check=True)
    try:
        env = {**os.environ, "KFLEX_CACHE": str(small)}
        done = _vm("run", "--kernel", kernel_file, "--root", "image", "--", "true", env=env)
        _one_line(done, "no space for the guest's root", "MB are needed", "KFLEX_CACHE")
        assert not list(small.glob("rootfs-*/*"))
    finally:
        subprocess.run(["umount", small], check=True)


def test_the_hosts_root_is_not_shared_by_an_ordinary_user() -> None:
    require("root")

    def ask() -> str:
        assert run._root("auto") == "image"
        return run._root("virtiofs")

    assert "Unavailable: the host's root cannot be shared with a guest" in _as_nobody(ask)


def test_a_shell_wants_a_terminal() -> None:
    _one_line(_vm("shell"), "vm shell wants a terminal", "vm run")


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--mem", "much"), "no size such as"),
        (("--mem", "1M"), "not between"),
        (("--smp", "0"), "0"),
        (("--timeout", "0"), "0"),
        (("--env", "1=2"), "not NAME=VALUE"),
        (("--take", "/nowhere"), "/nowhere"),
        (("--accel", "xen"), "xen"),
    ],
)
def test_bad_options(arguments: tuple[str, ...], what: str) -> None:
    done = _vm("run", *arguments, "--", "true")
    assert done.returncode == 2 and what in done.stderr and "Traceback" not in done.stderr


def test_leaving_the_shell_ends_the_guest(fake: Fake, kernel_file: Path, tmp_path: Path) -> None:
    require("root")
    fake("hangs")
    command = [*_VM, "shell", *_TCG, "--kernel", str(kernel_file)]
    watch = Watch(tmp_path / "tmp", tmp_path / "cache", own=True)
    with _on_a_terminal(command, watch.env) as (process, terminal):
        _until(terminal, b"so far")
        os.write(terminal, b"\x1d")
        _drain(terminal)
        assert process.wait(20) == 130
    assert not watch.processes()


# --- helpers ----------------------------------------------------------------------------------------------


def _as_nobody(ask: Callable[[], object]) -> str:
    """What ``ask`` gives, or says, as an ordinary user."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            try:
                said = str(ask())
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
            os.write(write, said.encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        said = stream.read().decode()
    os.waitpid(child, 0)
    return said


def _eventually(happened: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextlib.contextmanager
def _on_a_terminal(command: list[str], env: dict[str, str]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command, env={**env, "TERM": "dumb"}, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    try:
        yield process, ours
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(ours)


def _until(terminal: int, text: bytes) -> None:
    seen = b""
    while text not in seen:
        try:
            data = os.read(terminal, 4096)
        except OSError:
            data = b""
        assert data, seen
        seen += data


def _drain(terminal: int) -> None:
    """Read what is still written there, until the other side is closed."""
    with contextlib.suppress(OSError):
        while os.read(terminal, 4096):
            pass
