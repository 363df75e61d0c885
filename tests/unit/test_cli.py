"""The command line's promises: one line for each failure, an exit code, never a traceback."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kflex_repro import cli
from kflex_repro.errors import KflexError, Unavailable, os_failure

TOP = Path(__file__).resolve().parents[2]


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kflex_repro", *args],
        check=False,
        capture_output=True,
        text=True,
        cwd=TOP,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
    )


def failing(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli.cli, "main", fail)
    for signum in (signal.SIGTERM, signal.SIGHUP):
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        del signum
    return cli.main([])


def test_errors_are_one_line() -> None:
    error = KflexError("it\nbroke", "some\nwhere", "do\nthat")
    assert str(error) == "it broke (some where): do that"
    assert (str(KflexError("broke")), KflexError("broke").exit_code) == ("broke", 1)
    assert Unavailable("no such thing").exit_code == 3
    failed = os_failure("bpf_thing", -errno.EPERM)
    assert failed.errno == errno.EPERM and "EPERM" in str(failed) and "run as root" in str(failed)
    assert "ENOTSUPP" in str(os_failure("bpf_thing", 524))
    assert "errno 9999" in str(os_failure("bpf_thing", 9999))


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KflexError("it broke", "here", "mend it"), 1, "kflex-repro: it broke (here): mend it"),
        (Unavailable("no BTF"), 3, "kflex-repro: no BTF"),
        (KeyboardInterrupt(), 130, "kflex-repro: interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 1, "No space left on device: /x (free some"),
    ],
)
def test_failures_become_one_line_and_a_code(
    error: BaseException,
    code: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("KFLEX_DEBUG", raising=False)
    assert failing(error, monkeypatch) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and text in captured.err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFLEX_DEBUG", "1")
    with pytest.raises(KflexError):
        failing(KflexError("it broke"), monkeypatch)


def test_help_and_version_need_no_other_room() -> None:
    shown = run("--help")
    assert shown.returncode == 0
    for command in ("bench", "build", "doctor", "offload"):
        assert command in shown.stdout
    assert run("--version").stdout.startswith("kflex-repro, version ")


@pytest.mark.parametrize(
    "args", [["nonsense"], ["--nonsense"], ["build", "--jobs", "0"], ["doctor", "extra"]]
)
def test_bad_usage_is_exit_2_without_traceback(args: list[str]) -> None:
    done = run(*args)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "Error" in done.stderr


def test_build_of_an_unknown_name_says_what_there_is(tmp_path: Path) -> None:
    done = run("build", "--only", "nonsense", KFLEX_CACHE=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("kflex-repro: nothing to build is called nonsense (there are: ")


def test_an_unusable_cache_directory_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("build", KFLEX_CACHE=str(tmp_path / "file" / "cache"))
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "set KFLEX_CACHE" in done.stderr


def test_sources_elsewhere_are_said(tmp_path: Path) -> None:
    done = run("build", KFLEX_SOURCE=str(tmp_path))
    assert done.returncode == 1 and "BPF sources are not there" in done.stderr
