"""BTF parsing on damaged input: an error, never a crash."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kflex_repro.bpf import btf
from kflex_repro.errors import KflexError


def raw(types: bytes, strings: bytes) -> bytes:
    return (
        struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings)) + types + strings
    )


INT = struct.pack("<IIII", 1, 1 << 24, 4, 32)  # type 1: "int", unsigned, 32 bits
PAIR = struct.pack("<III", 5, 4 << 24 | 2, 8) + struct.pack("<III", 10, 1, 0) + struct.pack("<III", 12, 1, 32)
STRINGS = b"\0int\0pair\0a\0b\0"


def test_a_hand_made_struct() -> None:
    pair = btf.Btf(raw(INT + PAIR, STRINGS)).struct("pair")
    value = pair.from_buffer_copy(struct.pack("<II", 1, 2))
    assert (value.a, value.b) == (1, 2)


@given(st.binary(max_size=200))
def test_random_bytes(data: bytes) -> None:
    with pytest.raises(KflexError):
        btf.Btf(data)


@given(st.integers(0, 24 + len(INT + PAIR + STRINGS) - 1), st.integers(0, 255))
def test_flipped_bytes(at: int, value: int) -> None:
    data = bytearray(raw(INT + PAIR, STRINGS))
    data[at] = value
    try:
        btf.Btf(bytes(data)).struct("pair")
    except KflexError as error:
        assert "\n" not in str(error)


@given(st.integers(0, 24 + len(INT + PAIR + STRINGS) - 1))
def test_truncated(length: int) -> None:
    data = raw(INT + PAIR, STRINGS)[:length]
    try:
        btf.Btf(data).struct("pair")
    except KflexError:
        pass
    else:
        pytest.fail("a truncated file was taken for whole")


def test_files_that_are_no_objects(tmp_path: Path) -> None:
    with pytest.raises(KflexError, match="cannot read"):
        btf.load(tmp_path / "none")
    path = tmp_path / "file"
    for content in (b"", b"\x7fELF", b"\x7fELF" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(KflexError):
            btf.load(path)
