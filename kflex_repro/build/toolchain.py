"""The compilers and bpftool: which, what version, and running them with their output kept in a log."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from kflex_repro.build import cache
from kflex_repro.errors import KflexError, Unavailable
from kflex_repro.patience import patient

CLANG_MINIMUM = (12,)
BPFTOOL_MINIMUM = (5, 13)
PERF_MINIMUM = (5, 10)
# What a make or ninja is given to end its compilers in.
_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Tool:
    """A program we found: its path, the line it reports as its version, and the number in it."""

    name: str
    path: str
    banner: str
    version: tuple[int, ...]

    @property
    def text(self) -> str:
        """The version as people write it, e.g. 14.0.6."""
        return ".".join(map(str, self.version))


def probe(name: str, path: str) -> Tool | None:
    """Run ``path --version``; None unless it works and says a version."""
    try:
        out = subprocess.run(
            [path, "--version"],
            check=False,
            capture_output=True,
            text=True,
            timeout=patient(20),
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    banner = next((line.strip() for line in out.stdout.splitlines() if line.strip()), "")
    numbers = re.search(r"(?:version |v)(\d+(?:\.\d+)+)", banner) or re.search(r"(\d+(?:\.\d+)+)", banner)
    if out.returncode != 0 or numbers is None:
        return None
    return Tool(name, path, banner, tuple(int(part) for part in numbers.group(1).split(".")))


def _candidates(name: str, variable: str, more: Sequence[str] = ()) -> list[str]:
    if chosen := os.environ.get(variable):
        return [chosen]
    # sbin directories are not on every user's PATH, and bpftool lives there.
    path = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"
    found = shutil.which(name, path=path)
    return ([found] if found else []) + list(more)


def _numbered(pattern: str) -> list[str]:
    """Paths like /usr/bin/clang-19, the highest number first."""
    directory, _, name = pattern.rpartition("/")
    found = [str(path) for path in Path(directory or "/").glob(name)]
    return sorted(found, key=lambda path: [int(part) for part in re.findall(r"\d+", path)], reverse=True)


@functools.cache
def find_clang() -> Tool | None:
    """clang, by KFLEX_CLANG, PATH, or a versioned name; None where there is none."""
    paths = _candidates("clang", "KFLEX_CLANG", _numbered("/usr/bin/clang-[0-9]*"))
    return next((tool for path in paths if (tool := probe("clang", path))), None)


def newest_clang(minimum: tuple[int, ...]) -> Tool | None:
    """The newest clang of the system, whatever its name, if it is at least ``minimum``."""
    found = [
        tool
        for path in [*_candidates("clang", ""), *_numbered("/usr/bin/clang-[0-9]*")]
        if (tool := probe("clang", path))
    ]
    newest = max(found, key=lambda tool: tool.version, default=None)
    return newest if newest and newest.version >= minimum else None


@functools.cache
def find_cc() -> Tool | None:
    """The C compiler for user space: CC, gcc or cc."""
    paths = _candidates("gcc", "CC", _candidates("cc", "CC"))
    return next((tool for path in paths if (tool := probe("cc", path))), None)


@functools.cache
def find_bpftool() -> Tool | None:
    """bpftool, by KFLEX_BPFTOOL or PATH; None where there is none."""
    # Ubuntu's is a wrapper that wants the running kernel's own package. Any installed one serves: what we ask
    # of it does not depend on the kernel.
    more = _numbered("/usr/lib/linux-tools/*/bpftool") + _numbered("/usr/lib/linux-tools-*/bpftool")
    paths = _candidates("bpftool", "KFLEX_BPFTOOL", more)
    return next((tool for path in paths if (tool := probe("bpftool", path))), None)


@functools.cache
def find_perf() -> Tool | None:
    """perf, by KFLEX_PERF or PATH; None where there is none."""
    # As with bpftool, Ubuntu's is a wrapper for the running kernel's own.
    more = _numbered("/usr/lib/linux-tools/*/perf") + _numbered("/usr/lib/linux-tools-*/perf")
    paths = _candidates("perf", "KFLEX_PERF", more)
    return next((tool for path in paths if (tool := probe("perf", path))), None)


def perf() -> Tool:
    """perf, new enough to be switched on and off by a pipe (5.10); Unavailable otherwise."""
    fix = "apt install linux-perf (Ubuntu: linux-tools-generic; Fedora: perf)"
    return _demand(find_perf(), "perf", PERF_MINIMUM, fix, "KFLEX_PERF")


def clang() -> Tool:
    """clang, new enough; Unavailable otherwise."""
    return _demand(find_clang(), "clang", CLANG_MINIMUM, "apt install clang", "KFLEX_CLANG")


def cc() -> Tool:
    """The C compiler; Unavailable where there is none."""
    return _demand(find_cc(), "C compiler", (), "apt install gcc", "CC")


def bpftool() -> Tool:
    """bpftool, new enough; Unavailable otherwise."""
    fix = "apt install bpftool (Ubuntu: linux-tools-generic)"
    return _demand(find_bpftool(), "bpftool", BPFTOOL_MINIMUM, fix, "KFLEX_BPFTOOL")


def _demand(tool: Tool | None, name: str, minimum: tuple[int, ...], fix: str, variable: str) -> Tool:
    if tool is None:
        raise Unavailable(f"no working {name} found", os.environ.get(variable, ""), fix)
    if tool.version < minimum:
        needed = ".".join(map(str, minimum))
        raise Unavailable(f"{name} {tool.text} is too old, {needed} is needed", tool.path, fix)
    return tool


def target_arch() -> str:
    """The kernel's name of this architecture, for -D__TARGET_ARCH_..."""
    machine = platform.machine()
    names = {
        "x86_64": "x86",
        "aarch64": "arm64",
        "riscv64": "riscv",
        "ppc64le": "powerpc",
        "s390x": "s390",
        "loongarch64": "loongarch",
    }
    return names.get(machine, machine)


def output(command: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """What one of Debian's package tools prints; nothing if it fails, Unavailable where it is not there."""
    try:
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=patient(120),
            env={**os.environ, "LC_ALL": "C", **(env or {})},
        )
    except FileNotFoundError:
        raise Unavailable(
            f"{command[0]} is not there", "", "source packages need Debian's or Ubuntu's package tools"
        ) from None
    return done.stdout if done.returncode == 0 else ""


def _signal_group(group: int, signum: int) -> bool:
    """Send a signal (0: none) to what is left of a command and its children; whether there was anything."""
    try:
        os.killpg(group, signum)
    except ProcessLookupError:
        return False
    return True


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a command and its compilers: politely first, as only ninja knows its own compilers' groups."""
    group, deadline = process.pid, time.monotonic() + _GRACE_SECONDS
    try:
        _signal_group(group, signal.SIGTERM)
        while _signal_group(group, 0) and time.monotonic() < deadline:
            # A finished leader counts as a member until it is waited for.
            process.poll()
            time.sleep(0.01)
    finally:
        _signal_group(group, signal.SIGKILL)
        process.wait()


# A reader in the command's own group: its pipe ends when we do, and then the group does. Without it a make
# that was left alone goes on for minutes.
_LEASHED = 'exec 3<&0 </dev/null; (read _ <&3; kill -TERM 0) >/dev/null 2>&1 & exec 3<&-; exec "$@"'


@contextlib.contextmanager
def _leash() -> Iterator[int]:
    """The end of a pipe that reads nothing for as long as this process lives and is in here."""
    reader, writer = os.pipe()
    try:
        yield reader
    finally:
        os.close(writer)
        os.close(reader)


def _output(path: Path | None, stream: IO[bytes], files: contextlib.ExitStack) -> IO[bytes]:
    return files.enter_context(path.open("wb")) if path else stream


def _show(lines: IO[bytes], stream: IO[bytes], watch: Callable[[str], None]) -> None:
    for line in lines:
        stream.write(line)
        stream.flush()
        watch(line.decode(errors="replace").rstrip("\n"))


class Runner:
    """Runs build commands; ``stop()`` ends those that still run (another failed, or Ctrl-C)."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def stop(self) -> None:
        """End what runs, with the compilers that a make or ninja started, and start nothing more."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        for process in running:
            _signal_group(process.pid, signal.SIGTERM)
        for process in running:
            _end_group(process)

    def run(
        self,
        step: str,
        command: Sequence[str | Path],
        log: Path,
        cwd: Path | None = None,
        stdout: Path | None = None,
        watch: Callable[[str], None] | None = None,
    ) -> None:
        """Run one command, its output appended to ``log`` (standard output to ``stdout`` if given).

        With ``watch``, a long one: each line of its output is shown to it, too, and the command and its
        compilers end with this process, however that ends. BuildError, with the log's name and its last error
        lines, if it fails; the log stays.
        """
        words = [str(part) for part in command]
        log.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as files:
            stream = files.enter_context(log.open("ab"))
            stream.write(f"+ {' '.join(words)}\n".encode())
            stream.flush()
            stdin = subprocess.DEVNULL
            if watch:
                stdin = files.enter_context(_leash())
                words = ["sh", "-c", _LEASHED, "sh", *words]
            with self._lock:
                if self._stopped:
                    raise KflexError("stopped", step)
                try:
                    process = subprocess.Popen(
                        words,
                        cwd=cwd,
                        stdin=stdin,
                        stdout=subprocess.PIPE if watch else _output(stdout, stream, files),
                        stderr=subprocess.STDOUT if watch else stream,
                        env={**os.environ, "LC_ALL": "C"},
                        process_group=0,
                    )
                except OSError as error:
                    raise BuildError(step, f"cannot run {command[0]}: {error.strerror}", log) from None
                self._running.add(process)
            try:
                if watch and process.stdout:
                    _show(files.enter_context(process.stdout), stream, watch)
                code = process.wait()
            finally:
                with self._lock:
                    self._running.discard(process)
                if process.poll() is None:
                    _end_group(process)
        if code != 0:
            raise BuildError(step, error_lines(log) or f"exit code {code}", log)


def error_lines(log: Path, count: int = 3) -> str:
    """The first lines of a log that say "error" (the later ones follow from them), or else its last lines."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    lines = lines[max((at for at, line in enumerate(lines) if line.startswith("+ ")), default=-1) + 1 :]
    errors = [line for line in lines if re.search(r"\berror\b|\bE: |\*\*\*|undefined reference", line, re.I)]
    return " | ".join(errors[:count] or lines[-count:])


class BuildError(KflexError):
    """A build step failed; ``log`` is what it printed."""

    def __init__(self, step: str, reason: str, log: Path) -> None:
        super().__init__(f"building {step} failed", reason, f"the whole log is {log}")
        self.log = log


def log_path(step: str, key: str) -> Path:
    """Where a step's log is kept; an older one of the same inputs is replaced."""
    path = cache.root() / "logs" / f"{step}-{key[:12]}.log"
    path.unlink(missing_ok=True)
    return path
