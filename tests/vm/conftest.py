"""Guests: real ones on the distribution's stock kernel, and a QEMU that only speaks like one."""

from __future__ import annotations

import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kflex_repro.build import cache
from kflex_repro.errors import KflexError
from kflex_repro.vm import kernels, qemu
from tests.conftest import unavailable
from tests.vm import fake_qemu


@pytest.fixture(scope="session")
def stock() -> kernels.Kernel:
    """The stock kernel, and a QEMU to boot it."""
    try:
        qemu.program()
        return kernels.find("stock")
    except KflexError as error:
        unavailable(str(error))


@pytest.fixture(scope="session")
def users_cache() -> Path:
    """The cache of whoever runs the tests, where a test has one of its own, too."""
    return cache.root()


def bzimage(release: str = "6.12.0-test", sixty_four: bool = True) -> bytes:
    """The header of an x86-64 kernel image, and no more."""
    image = bytearray(0x400)
    image[0x1FE:0x200] = b"\x55\xaa"
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, 0x20F)
    struct.pack_into("<H", image, 0x20E, 0x100)
    struct.pack_into("<H", image, 0x236, int(sixty_four))
    text = f"{release} (builder@host) #1".encode()
    image[0x300 : 0x300 + len(text)] = text
    return bytes(image)


@pytest.fixture
def public(tmp_path: Path) -> Iterator[Path]:
    """A directory that every user may enter, as tmp_path is not."""
    del tmp_path
    with tempfile.TemporaryDirectory(prefix="kflex-public-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def kernel_file(tmp_path: Path) -> Path:
    path = tmp_path / "bzImage"
    path.write_bytes(bzimage())
    return path


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Callable[[], list[str]]]:
    """``fake("panics")`` makes QEMU such a guest, in a new cache; the result says how it was started."""
    program, starts = tmp_path / "qemu", tmp_path / "starts"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -S {fake_qemu.__file__} "$@"\n')
    program.chmod(0o755)
    starts.touch()
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("KFLEX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KFLEX_QEMU", str(program))
    monkeypatch.setenv("FAKE_STARTS", str(starts))

    def become(guest: str) -> Callable[[], list[str]]:
        monkeypatch.setenv("FAKE_GUEST", guest)
        return lambda: starts.read_text().split()

    return become
