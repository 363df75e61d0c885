"""appendfsync everysec: while an fsync is under way, Redis answers commands that it has not written yet.

``kill -9`` then takes them back, as it does on plain Redis. It must not take back a command and keep a SET
that the kernel accepted after it was answered: the dataset would be in a state that never was.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.redis.harness import Conn, eventually, need_offload, offloaded_server

# fdatasync() that takes as long as the file $KFLEX_TEST_HANG is there.
HANGING_FSYNC = """
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
int fdatasync(int fd)
{
    while (access(getenv("KFLEX_TEST_HANG"), F_OK) == 0)
        usleep(1000);
    return (int)syscall(SYS_fdatasync, fd);
}
"""


def _persistence(conn: Conn) -> dict[str, str]:
    text = conn.do("INFO", "persistence")
    assert isinstance(text, bytes)
    return dict(line.split(":", 1) for line in text.decode().split() if ":" in line)


def _number(conn: Conn, key: str) -> int:
    value = conn.do("GET", key)
    assert value is None or isinstance(value, bytes)
    return int(value or 0)


def killed_during_fsync(tmp_path: Path, patch: pytest.MonkeyPatch, **defines: str) -> tuple[int, int]:
    """What is left of A, counted up by INCR, and B, set to A's value by a SET after each INCR."""
    from kflex_repro import build
    from kflex_repro.build import toolchain

    need_offload()
    build.ensure(defines=defines)
    library, source, hang = tmp_path / "fsync.so", tmp_path / "fsync.c", tmp_path / "hang"
    source.write_text(HANGING_FSYNC)
    subprocess.run([toolchain.cc().path, "-shared", "-fPIC", "-o", library, source], check=True)
    patch.setenv("KFLEX_TEST_HANG", str(hang))
    patch.setenv("LD_PRELOAD", str(library))
    args = ("--appendonly", "yes", "--appendfsync", "everysec")
    with offloaded_server(args, defines=defines, dir=tmp_path) as sut:
        patch.delenv("LD_PRELOAD")
        # Another connection waits: one that has sent nothing but other commands for long is parked.
        with sut.connect() as conn, sut.connect() as waiting:
            sut.warm(conn)
            sut.must_serve(conn, ("SET", "B", "0"))
            hang.touch()
            try:
                eventually(
                    lambda: waiting.do("INCR", "x") and _persistence(waiting)["aof_pending_bio_fsync"] == "1",
                    what="an fsync under way",
                )
                for _ in range(100):
                    conn.do("SET", "B", str(conn.do("INCR", "A")))
                sut.server.kill()
            finally:
                hang.unlink()
        sut.server.start()
        with sut.connect() as conn:
            return _number(conn, "A"), _number(conn, "B")


@pytest.mark.bpf
@pytest.mark.skipif(os.environ.get("KFLEX_TEST_SERVER") == "plain", reason="kills the offload's server")
def test_a_set_does_not_outlive_a_command_answered_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = killed_during_fsync(tmp_path, monkeypatch)
    assert b <= a


@pytest.mark.bpf
@pytest.mark.skipif(os.environ.get("KFLEX_TEST_SERVER") == "plain", reason="kills the offload's server")
def test_with_the_gate_open_it_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Redis gives up waiting for the fsync after two seconds: on a slow day the INCRs are written after all.
    for attempt in range(5):
        home = tmp_path / str(attempt)
        home.mkdir()
        a, b = killed_during_fsync(home, monkeypatch, KFLEX_BREAK_OPEN_WHILE_POSTPONED="1")
        if b > a:
            return
    pytest.fail("the broken build was not seen to break anything")
