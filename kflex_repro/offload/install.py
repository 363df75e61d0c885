"""Puts kflex.so where redis-server may load it, and the line that loads it into its configuration.

A plan is made first and changes nothing; the new configuration is tried with a throwaway redis-server; then
each file is replaced at once. ``revert_plan`` is the way back.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kflex_repro.errors import KflexError, os_failure
from kflex_repro.offload.systemd import Need, Unit
from kflex_repro.offload.target import Target
from kflex_repro.patience import patient
from kflex_repro.redis.server import redis_binary

PREFIX = Path("/usr/lib/kflex-repro")
MODULE = "kflex.so"
USERS = "used-by"
BACKUP_SUFFIX = ".before-kflex"
COMMENT = b"# GET and SET from the kernel; `kflex-repro offload install --revert` takes this out"
_VERIFY_S = 30.0
_WORD = re.compile(rb"\"(?:\\.|[^\"\\])*\"|'(?:\\'|[^'])*'|[^\s]+")


@dataclass(frozen=True)
class Directive:
    """One line of a redis.conf: where it is (from 0), its name in lower case, its arguments unquoted."""

    path: Path
    line: int
    name: str
    args: tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """A file that is to have this content; None: that is to go. ``mode`` is for a new one."""

    path: Path
    content: bytes | None
    why: str
    mode: int = 0o644

    @property
    def kind(self) -> str:
        """``create``, ``change``, ``remove``, or ``keep`` where it is so already."""
        if not self.path.exists():
            return "keep" if self.content is None else "create"
        if self.content is None:
            return "remove"
        return "keep" if self.path.read_bytes() == self.content else "change"


@dataclass(frozen=True)
class Plan:
    """What an installation, or its reversal, does: files in this order; then what is left to do by hand.

    ``config`` is the server's main file, ``target`` the one that loads the module.
    """

    config: Path
    target: Path
    changes: tuple[Change, ...]
    notes: tuple[str, ...]
    next: tuple[str, ...]

    @property
    def is_done(self) -> bool:
        """Whether everything is as it should be already."""
        return all(change.kind == "keep" for change in self.changes)


# --- redis.conf --------------------------------------------------------------------------------------------


def read(path: Path) -> bytes:
    """A configuration file's bytes, or one clear line."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise KflexError("no such configuration file", str(path), "give the server's redis.conf") from None
    except IsADirectoryError:
        raise KflexError("a directory, not a configuration file", str(path)) from None
    except OSError as error:
        raise os_failure("open", error.errno or 0, str(path)) from None


def parse(text: bytes, path: Path) -> Iterator[Directive]:
    """The directives of one file. There is no way to continue a line: a backslash at its end is text."""
    for number, line in enumerate(text.split(b"\n")):
        words = [_unquote(word) for word in _WORD.findall(line)]
        if words and not words[0].startswith("#"):
            yield Directive(path, number, words[0].lower(), tuple(words[1:]))


def _unquote(word: bytes) -> str:
    text = os.fsdecode(word)
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return re.sub(r"\\(.)", r"\1", text[1:-1])
    return text


def directives(path: Path, _open: tuple[Path, ...] = ()) -> Iterator[Directive]:
    """Those of a file and of what it includes, in the order in which redis-server reads them.

    A relative include is looked for beside the file: where the server is started from is not known.
    """
    real = path.resolve()
    if real in _open:
        raise KflexError("the file includes itself", str(path), "redis-server could not read it either")
    for found in parse(read(real), real):
        yield found
        if found.name == "include" and found.args:
            name = real.parent / found.args[0]
            # Like redis-server: a pattern may match nothing, a plain name must be there.
            many = sorted(Path("/").glob(str(name)[1:])) if re.search(r"[*?[]", str(name)) else [name]
            for each in many:
                yield from directives(each, (*_open, real))


def _loads(found: Directive) -> bool:
    return found.name == "loadmodule" and bool(found.args) and Path(found.args[0]).name == MODULE


def with_module(text: bytes, module: str) -> bytes:
    """``text`` with ``loadmodule MODULE``: an existing line for kflex.so keeps its arguments."""
    ours = [found for found in parse(text, Path()) if _loads(found)]
    if not ours:
        end = b"" if not text or text.endswith(b"\n") else b"\n"
        return text + end + COMMENT + b"\nloadmodule " + os.fsencode(module) + b"\n"
    lines = text.split(b"\n")
    old = lines[ours[0].line]
    if ours[0].args[0] != module:
        word = list(_WORD.finditer(old))[1]
        lines[ours[0].line] = old[: word.start()] + os.fsencode(module) + old[word.end() :]
    return b"\n".join(lines)


def without_module(text: bytes) -> bytes:
    """``text`` without the lines that with_module() adds, wherever CONFIG REWRITE has put them."""
    gone = {found.line for found in parse(text, Path()) if _loads(found)}
    lines = text.split(b"\n")
    return b"\n".join(
        line for number, line in enumerate(lines) if number not in gone and line.strip() != COMMENT
    )


def config_of(found: Target) -> Path:
    """The configuration file of a running server; KflexError if it has none that we can see."""
    where = f"{found.host}:{found.port}"
    if not found.config:
        raise KflexError(
            "the server was started without a configuration file",
            where,
            f"add `--loadmodule {PREFIX / MODULE}` to its command line (kflex-repro build makes the module)",
        )
    ours, theirs = Path(found.config), Path(f"/proc/{found.pid}/root{found.config}")
    try:
        same = ours.samefile(theirs)
    except OSError:
        same = False
    if not same:
        raise KflexError(
            f"its {found.config} is a file of another root or container",
            where,
            "give the file in its image with --config, and a --prefix that is seen there",
        )
    return ours


# --- plans -------------------------------------------------------------------------------------------------


def plan(config: Path, built: Path, unit: Unit | None, prefix: Path = PREFIX) -> Plan:
    """What must change so that the server of ``config`` loads the module ``built`` when it starts.

    ``unit``: the systemd service that runs it. KflexError for what cannot be done.
    """
    if not prefix.is_absolute() or re.search(r"[\s\"'#]", str(prefix)):
        raise KflexError("give an absolute path without spaces and quotes", str(prefix), "--prefix")
    known = list(directives(config))
    ours = [found for found in known if _loads(found)]
    if len(ours) > 1:
        places = ", ".join(f"{found.path}:{found.line + 1}" for found in ours)
        raise KflexError("kflex.so is loaded more than once", places, "keep one of these lines")
    target = ours[0].path if ours else config.resolve()
    text = read(target)
    content = with_module(text, str(prefix / MODULE))
    users = sorted({*_users(prefix), str(target)})
    changes = [
        Change(prefix / MODULE, built.read_bytes(), "the module", 0o755),
        Change(prefix / USERS, _lines(users), "who loads it"),
    ]
    if content != text:
        mode = target.stat().st_mode & 0o7777
        if not _backup(target).exists():
            changes.append(Change(_backup(target), text, "the original", mode))
        changes.append(Change(target, content, "loads the module", mode))
    notes, todo = [], []
    if unit is not None:
        needs = unit.needs(prefix)
        if needs:
            changes.append(Change(unit.drop_in, _drop_in(needs), "; ".join(need.why for need in needs)))
            todo.append("systemctl daemon-reload")
        notes += unit.notes()
        todo.append(f"systemctl restart {unit.name}")
    else:
        todo.append("restart the redis-server")
    others = [found.args[0] for found in known if found.name == "loadmodule" and not _loads(found)]
    if others:
        notes.append(f"nothing is served beside other modules: {', '.join(others)}")
    return _possible(Plan(config, target, tuple(changes), tuple(notes), (*todo, "kflex-repro offload start")))


def revert_plan(config: Path, unit: Unit | None, prefix: Path = PREFIX) -> Plan:
    """What takes an installation away: the original file comes back where nobody has changed the new one."""
    files = sorted({config.resolve(), *(found.path for found in directives(config))})
    target = next((path for path in files if _backup(path).exists()), None)
    changes, notes = [], []
    if target is not None:
        original, text = read(_backup(target)), read(target)
        old = next((found.args[0] for found in parse(original, target) if _loads(found)), None)
        content = original
        if text != with_module(original, str(prefix / MODULE)):
            content = with_module(text, old) if old else without_module(text)
            notes.append(f"{target} was changed since: only our lines are taken out")
        changes = [Change(target, content, "as it was"), Change(_backup(target), None, "not needed any more")]
    if unit is not None:
        changes.append(Change(unit.drop_in, None, "not needed any more"))
    users = [user for user in _users(prefix) if user != str(target)]
    if users:
        changes.append(Change(prefix / USERS, _lines(users), "who loads it"))
        notes.append(f"{prefix / MODULE} stays, for {', '.join(users)}")
    else:
        changes += [Change(prefix / name, None, "nobody loads it any more") for name in (MODULE, USERS)]
    todo = (f"systemctl daemon-reload; systemctl restart {unit.name}",) if unit else ("restart redis-server",)
    return _possible(Plan(config, target or config.resolve(), tuple(changes), tuple(notes), todo))


def _backup(target: Path) -> Path:
    return target.with_name(target.name + BACKUP_SUFFIX)


def _users(prefix: Path) -> list[str]:
    """Configuration files that load the module from there."""
    path = prefix / USERS
    return path.read_text().splitlines() if path.exists() else []


def _lines(users: list[str]) -> bytes:
    return "".join(f"{user}\n" for user in users).encode()


def _drop_in(needs: list[Need]) -> bytes:
    lines = ["# by kflex-repro offload install; --revert takes it away", "[Service]"]
    for need in needs:
        lines += [f"# {need.why}", need.setting]
    return ("\n".join(lines) + "\n").encode()


def _possible(made: Plan) -> Plan:
    """Say now, not half-way, what cannot be written."""
    for change in made.changes:
        if change.kind == "keep":
            continue
        place = next(path for path in change.path.parents if path.exists())
        if not os.access(place, os.W_OK):
            raise KflexError("cannot be written", str(place), "a read-only file system? or run it as root")
    return made


# --- doing it ----------------------------------------------------------------------------------------------


def apply(made: Plan, verify: bool = True) -> None:
    """Make the changes. A configuration that redis-server does not accept leaves the old one in place."""
    edited = next((c for c in made.changes if c.path == made.target and c.kind == "change"), None)
    before = [change for change in made.changes if change.content is not None and change is not edited]
    after = [change for change in made.changes if change.content is None]
    done: list[Change] = []
    try:
        for change in before:
            if change.kind != "keep":
                fresh = not change.path.exists()
                _write(change.path, change.content or b"", change.mode)
                if fresh:
                    done.append(change)
        if edited is not None and edited.content is not None:
            _replace(made, edited.content, verify)
    except BaseException:
        # What was not there before goes again.
        for change in reversed(done):
            _remove(change.path)
        raise
    for change in after:
        _remove(change.path)


def _replace(made: Plan, content: bytes, verify: bool) -> None:
    target = made.target
    if target != made.config.resolve():
        # Only as a part of the main file can it be tried: put it in, and back if it does not do.
        old = read(target)
        _write(target, content)
        try:
            if verify:
                try_start(made.config)
        except BaseException:
            _write(target, old)
            raise
        return
    candidate = _temporary(target, content, target.stat().st_mode & 0o7777)
    try:
        if verify:
            try_start(candidate)
        candidate.rename(target)
    except BaseException:
        candidate.unlink(missing_ok=True)
        raise


def _temporary(path: Path, content: bytes, mode: int) -> Path:
    """A file beside ``path`` with its owner and attributes."""
    made = Path()
    try:
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        made = Path(name)
        with os.fdopen(fd, "wb") as out:
            out.write(content)
            out.flush()
            if path.exists():
                shutil.copystat(path, made)
                owner = path.stat()
                os.fchown(out.fileno(), owner.st_uid, owner.st_gid)
            os.fchmod(out.fileno(), mode)
            os.fsync(out.fileno())
    except OSError as error:
        with suppress(OSError):
            made.unlink()
        raise os_failure("write", error.errno or 0, str(path)) from None
    return made


def _write(path: Path, content: bytes, mode: int | None = None) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise os_failure("mkdir", error.errno or 0, str(path.parent)) from None
    kept = path.stat().st_mode & 0o7777 if path.exists() else mode
    temporary = _temporary(path, content, 0o644 if kept is None else kept)
    try:
        temporary.rename(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise os_failure("rename", error.errno or 0, str(path)) from None


def _remove(path: Path) -> None:
    """The file, and its directory if that was made for it and is empty now."""
    path.unlink(missing_ok=True)
    if path.name in (MODULE, USERS) or path.parent.name.endswith(".service.d"):
        with suppress(OSError):
            path.parent.rmdir()


def try_start(config: Path, timeout: float = _VERIFY_S) -> None:
    """Start a redis-server with this configuration that neither listens on a port nor touches any data.

    KflexError, with its words, if it does not come up or does not load the module.
    """
    names = {found.name for found in directives(config)}
    with tempfile.TemporaryDirectory(prefix="kflex-verify-") as scratch:
        command = [str(redis_binary()), str(config), "--port", "0", "--unixsocket", f"{scratch}/sock"]
        command += ["--dir", scratch, "--save", "", "--appendonly", "no", "--dbfilename", "none.rdb"]
        command += ["--daemonize", "no", "--supervised", "no", "--pidfile", f"{scratch}/pid"]
        command += ["--logfile", "", "--loglevel", "notice", "--syslog-enabled", "no"]
        for name, value in (("tls-port", "0"), ("cluster-enabled", "no"), ("replicaof", "no one")):
            if name in names or (name == "replicaof" and "slaveof" in names):
                command += [f"--{name}", *value.split()]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=config.parent,
            start_new_session=True,
        )
        try:
            said = _read_until(process, b"eady to accept connections", time.monotonic() + patient(timeout))
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()
    if "Module 'kflex' loaded" not in said:
        words = [line for line in said.splitlines() if line.strip()][-3:]
        raise KflexError(
            f"redis-server does not start with this configuration: {' | '.join(words) or 'it says nothing'}",
            str(config),
            "the old one stays",
        )


def _read_until(process: subprocess.Popen[bytes], mark: bytes, deadline: float) -> str:
    assert process.stdout is not None
    said = b""
    while mark not in said and (left := deadline - time.monotonic()) > 0:
        if not select.select([process.stdout], [], [], left)[0]:
            break
        part = os.read(process.stdout.fileno(), 1 << 16)
        if not part:
            break
        said += part
    return said.decode(errors="replace")
