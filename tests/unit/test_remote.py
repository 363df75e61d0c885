"""--host: what can be said without a host."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import paramiko
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from kflex_repro.cli import cli
from kflex_repro.errors import KflexError
from kflex_repro.remote import frames, inventory, options, run, session, ssh

TOP = Path(__file__).resolve().parents[2]


# --- frames -----------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from([b"o", b"e", b"K"]), st.binary(max_size=300))), st.data())
def test_frames_survive_any_cut(said: list[tuple[bytes, bytes]], data: Any) -> None:
    stream = b"".join(frames.encode(kind, payload) for kind, payload in said)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    decoder, heard = frames.Decoder(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        heard += decoder.feed(stream[start:end])
    assert heard == said


def test_what_is_no_frame_is_garbage() -> None:
    with pytest.raises(frames.Garbage):
        list(frames.Decoder().feed(b"Last login: Mon Nov 23"))
    for payload in (b"", b"[]", b"{", b"\xff"):
        with pytest.raises(frames.Garbage):
            frames.decode(payload)


# --- addresses and inventories ----------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("text", "user", "place"),
    [
        ("ann@db1", "ann", ("db1", 22)),
        ("ann@db1:2222", "ann", ("db1", 2222)),
        ("ann@10.0.0.1:22", "ann", ("10.0.0.1", 22)),
        ("ann@[fe80::1%eth0]:2222", "ann", ("fe80::1%eth0", 2222)),
        ("a@b@db1", "a@b", ("db1", 22)),
    ],
)
def test_addresses(home: Path, text: str, user: str, place: tuple[str, int]) -> None:
    target = ssh.parse(text)
    assert (target.user, target.addresses) == (user, (place,))


@pytest.mark.parametrize(
    "text", ["", "@db1", "ann@", "ann@db1:", "ann@db1:0", "ann@db1:65536", "db 1", "-oX", "a:b:c"]
)
def test_what_is_no_address(home: Path, text: str) -> None:
    with pytest.raises(KflexError, match="USER@HOST"):
        ssh.parse(text)


def test_an_inventory(home: Path) -> None:
    path = home / "hosts.toml"
    path.write_text(
        '[server.db1]\naddresses = ["10.0.0.1", "db1.lab:2222"]\nuser = "ann"\nidentity = "~/key"\n'
        '[test.client]\naddresses = ["10.0.0.2"]\nuser = "bob"\n'
    )
    first, second = inventory.load(path)
    assert (first.name, first.user, first.identities) == ("db1", "ann", (f"{home}/key",))
    assert first.addresses == (("10.0.0.1", 22), ("db1.lab", 2222))
    assert [one.name for one in inventory.load(path, ["test"])] == ["client"] == [second.name]
    with pytest.raises(KflexError, match="no host or role 'db2'"):
        inventory.load(path, ["db2"])


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "no hosts in it"),
        ("[server", "no TOML"),
        ("[client.a]\naddresses = ['a']", "[server.NAME] or [test.NAME], not [client]"),
        ("[server.a]", "addresses"),
        ("[server]\na = 1", "it is a table"),
        ("[server.a]\naddresses = 'a'", "addresses is a list, not 'a'"),
        ("[server.a]\naddresses = ['x@a']", "addresses"),
        ("[server.a]\naddresses = ['a:99999']", "no host"),
        ("[server.a]\naddresses = ['a']\npassword = 'x'", "unknown key 'password'"),
        ("[server.a]\naddresses = ['a']\n[test.a]\naddresses = ['a']", "there twice"),
        ("[server.'../a']\naddresses = ['a']", "a name is"),
    ],
)
def test_a_wrong_inventory_is_one_line(home: Path, text: str, part: str) -> None:
    path = home / "hosts.toml"
    path.write_text(text)
    with pytest.raises(KflexError) as caught:
        inventory.load(path)
    assert part in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


# --- command lines ----------------------------------------------------------------------------------------


@pytest.fixture
def forwarded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[options.Chosen, run.Wanted]]:
    """What a command line would have run there."""
    seen: list[tuple[options.Chosen, run.Wanted]] = []

    def remember(chosen: options.Chosen, wanted: run.Wanted) -> int:
        seen.append((chosen, wanted))
        return 7

    monkeypatch.setattr(run, "run", remember)

    def ask(*words: str) -> tuple[options.Chosen, run.Wanted]:
        result = CliRunner().invoke(cli, list(words), prog_name="kflex-repro")
        assert result.exit_code == 7, result.output
        return seen.pop()

    return ask


def test_the_command_line_goes_over_as_it_was_given(
    forwarded: Callable[..., tuple[options.Chosen, run.Wanted]],
) -> None:
    chosen, wanted = forwarded(
        *("monitor", "--host", "ann@db1", "--port", "1", "--port=2", "--slower-than", "1ms", "--events"),
        *("--no-redact", "--key", "--user:*", "--record", "x/busy.kmon", "--no-sudo"),
    )
    assert set(wanted.arguments) == {
        *("monitor", "--port=1", "--port=2", "--slower-than=1ms", "--events", "--no-redact", "--key=--user:*")
    }
    assert wanted.outputs == {"record": ("--record", Path("x/busy.kmon"))}
    assert (chosen.host, chosen.sudo, chosen.identity) == ("ann@db1", False, None)
    _, wanted = forwarded("trace", "list", "--host", "db1", "syscalls", "--match", "epoll*", "--json")
    assert wanted.arguments == ("trace", "list", "--match=epoll*", "--json", "--", "syscalls")
    assert wanted.as_json and wanted.name == "trace-list" and not wanted.outputs
    _, wanted = forwarded("profile", "--all", "--host", "db1")
    option, place = wanted.outputs["out"]
    assert option == "--out" and place.parent == Path("results") and place.name.endswith("-profile")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["monitor", "--identity", "x"], "--identity goes with --host or --hosts"),
        (["monitor", "--host", "a", "--hosts", "b"], "not both"),
        (["profile", "--host", "a", "diff", "x", "y"], "diff works on files of this host"),
        (["monitor", "--host", "a", "--port", "none"], "Invalid value for '--port'"),
    ],
)
def test_options_that_do_not_go_together(words: list[str], part: str) -> None:
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 2 and part in result.output


def test_what_is_not_given_stays_as_it_was() -> None:
    @options.remotely(out=None)
    @click.command()
    @click.option("--out")
    def command(out: str | None) -> None:
        click.echo(f"here: {out}")

    assert CliRunner().invoke(command, ["--out", "x"]).output == "here: x\n"


def test_a_recording_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "old.kmon").touch()
    words = ["monitor", "--host", "ann@127.0.0.1:1", "--record", str(tmp_path / "old.kmon")]
    result = CliRunner().invoke(cli, words)
    assert isinstance(result.exception, KflexError) and "the file exists" in str(result.exception)


# --- the agent --------------------------------------------------------------------------------------------


def agent(request: dict[str, Any] | None, tmp_path: Path) -> list[tuple[bytes, bytes]]:
    """What the agent answers, until its input ends."""
    ran = subprocess.run(
        [sys.executable, "-m", "kflex_repro", "remote-agent"],
        check=False,
        input=frames.encode(frames.REQUEST, request) if request else b"",
        capture_output=True,
        cwd=TOP,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert ran.stdout.startswith(frames.MAGIC), ran.stderr
    assert ran.stderr == b"" and not list(tmp_path.iterdir())
    return list(frames.Decoder().feed(ran.stdout.removeprefix(frames.MAGIC)))


@pytest.mark.parametrize(
    "request_",
    [
        {"argv": ["offload", "stop"], "outputs": []},
        {"argv": [], "outputs": []},
        {"argv": ["trace"], "outputs": ["../x"]},
        {"argv": ["trace"]},
        {},
    ],
)
def test_the_agent_runs_probes_only(request_: dict[str, Any], tmp_path: Path) -> None:
    said = agent(request_, tmp_path)
    assert frames.STARTED not in [kind for kind, _ in said]


def test_an_agent_that_is_asked_nothing_ends(tmp_path: Path) -> None:
    assert [kind for kind, _ in agent(None, tmp_path)] == [frames.HELLO]


# --- results ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/etc/passwd", "png/../../x", "other/x", "png", "", "out/a/\0", "../png/x"])
def test_a_result_cannot_leave_its_place(path: str) -> None:
    with pytest.raises(KflexError, match="nobody asked for"):
        session._place(path, {"png": Path("chart.png"), "out": Path("profile")}, "db1")


def test_where_results_go() -> None:
    outputs = {"png": Path("a/chart.png"), "out": Path("profile")}
    assert session._place("png/chart.png", outputs, "db1") == Path("a/chart.png")
    assert session._place("out/profile/x/y.json", outputs, "db1") == Path("profile/x/y.json")


class _Sftp:
    """An SFTP client that gives this content."""

    def __init__(self, *contents: bytes) -> None:
        self._contents = list(contents)

    def get_channel(self) -> Any:
        return self

    def settimeout(self, seconds: float) -> None:
        del seconds

    def open(self, path: str, mode: str) -> Any:
        del path, mode
        content = self._contents.pop(0)

        class File:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None: ...

            def prefetch(self, size: int) -> None:
                del size

            def read(self, size: int) -> bytes:
                nonlocal content
                data, content = content[:size], content[size:]
                return data

        return File()


def fetch(place: Path, *contents: bytes) -> None:
    right = b"right"
    session._fetch_one(
        _Sftp(*contents),  # type: ignore[arg-type]
        "there",
        place,
        len(right),
        hashlib.sha256(right).hexdigest(),
        0o100640,
    )


def test_a_result_is_whole_or_not_there(tmp_path: Path) -> None:
    place = tmp_path / "new" / "result"
    fetch(place, b"wrong", b"right")
    assert place.read_bytes() == b"right" and place.stat().st_mode & 0o777 == 0o640
    for damaged in (b"wrong", b"righ", b"right!", b""):
        with pytest.raises(KflexError, match="damaged, twice"):
            fetch(place, damaged, damaged)
    assert place.read_bytes() == b"right" and list(place.parent.iterdir()) == [place]
    (tmp_path / "file").touch()
    with pytest.raises(KflexError, match="cannot write"):
        fetch(tmp_path / "file" / "result", b"right")


# --- logging in by password -------------------------------------------------------------------------------


class _Door(paramiko.ServerInterface):
    def check_auth_password(self, username: str, password: str) -> int:
        right = (username, password) == ("ann", "open sesame")
        return paramiko.AUTH_SUCCESSFUL if right else paramiko.AUTH_FAILED  # type: ignore[attr-defined]

    def get_allowed_auths(self, username: str) -> str:
        del username
        return "password"


@pytest.fixture
def door(home: Path) -> Iterator[int]:
    """The port of a server that knows passwords only, and whose key is known."""
    key = paramiko.ECDSAKey.generate()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        (home / ".ssh" / "known_hosts").write_text(
            f"[127.0.0.1]:{port} {key.get_name()} {key.get_base64()}\n"
        )
        transports = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                transport = paramiko.Transport(connection)
                transports.append(transport)
                transport.add_server_key(key)
                transport.start_server(server=_Door(), event=threading.Event())

        threading.Thread(target=serve, daemon=True).start()
        yield port
        listener.shutdown(socket.SHUT_RDWR)
        for one in transports:
            one.close()


def test_a_password_lets_in_or_does_not(door: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    target = ssh.Target("db1", (("127.0.0.1", door),), "ann", password="open sesame")
    assert "sesame" not in repr(target)
    with ssh.Link(target) as link:
        link.again()
        transport = link.client.get_transport()
        assert transport is not None and transport.is_authenticated()
    for password in ("open barley", None):
        with pytest.raises(KflexError, match="login as ann refused") as caught:
            ssh.Link(ssh.Target("db1", target.addresses, "ann", password=password))
        assert "barley" not in str(caught.value)


def test_a_password_is_never_shown() -> None:
    asking = (
        "from kflex_repro.remote import ssh; t = ssh.Target('db1', (('db1', 22),), 'ann');"
        "print('got', len(ssh.ask_password(t)))"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(TOP)
        os.execv(sys.executable, [sys.executable, "-c", asking])
    said = b""
    try:
        while b"got 11" not in said:
            assert select.select([terminal], [], [], 30)[0], said
            said += os.read(terminal, 1024)
            if said.endswith(b"password of ann on db1: "):
                os.write(terminal, b"open sesame\n")
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)
    assert b"sesame" not in said


# --- many hosts -------------------------------------------------------------------------------------------


def test_the_summary_of_many_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = ssh.Target("db1", (("a", 22),), "ann")
    (tmp_path / "db1").mkdir()
    (tmp_path / "db1" / "messages.txt").write_text("attaching\nkflex-repro: no such process\n")
    worker = run._Worker(target, session.Request((), {}), None, None, code=3)
    run._summary([worker], tmp_path, as_json=True)
    (row,) = json.loads(capsys.readouterr().out)["hosts"]
    assert (row["host"], row["exit"], row["error"]) == ("db1", 3, "kflex-repro: no such process")
