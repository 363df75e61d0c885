"""Histograms, filters and wording of the monitor, without a kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kflex_repro.errors import KflexError
from kflex_repro.probe import events, latency, monitor
from kflex_repro.probe.events import Event
from kflex_repro.probe.record import Recording


def event(request: bytes, reply: bytes = b"+OK\r\n", argc: int = 2, size: int | None = None) -> Event:
    phases = {"total": 21_400, "queue": 9_100, "exec": 1_200, "reply": 11_100}
    size = len(reply) if size is None else size
    return Event(1, 1, 1, 0, "GET", False, phases, argc, len(request), size, request, reply)


@given(st.integers(0, 1 << 38))
def test_every_value_lies_in_its_bucket(value: int) -> None:
    low, high = latency.bounds(latency.bucket(value))
    assert low <= value < high or latency.bucket(value) == 287
    assert value < 16 or (high - low) / low <= 0.125


@given(st.lists(st.integers(1, 10**10), min_size=1, max_size=200))
def test_percentiles_are_within_half_a_bucket(values: list[int]) -> None:
    made = latency.histogram(values)
    exact = sorted(values)[max(0, -(-len(values) // 2) - 1)]
    assert made.percentile(50) == pytest.approx(exact, rel=0.0626, abs=1)
    assert (made.count, made.sum, made.max) == (len(values), sum(values), max(values))


def test_what_came_since() -> None:
    before, after = latency.histogram([100, 5000]), latency.histogram([100, 5000, 200])
    made = after.since(before)
    assert made.count == 1
    assert made.max == latency.bounds(latency.bucket(200))[1]
    assert latency.histogram([]).percentile(99) == 0


@pytest.mark.parametrize(
    ("text", "prefix", "simple", "yes", "no"),
    [
        ("user:*", b"user:", True, b"user:1", b"xuser:1"),
        ("user", b"user", True, b"user", b"user:1"),
        ("a*b", b"a", False, b"axxb", b"axx"),
        ("[^a]b", b"", False, b"xb", b"ab"),
        ("*", b"", True, b"", None),
    ],
)
def test_key_patterns(text: str, prefix: bytes, simple: bool, yes: bytes, no: bytes | None) -> None:
    made = monitor.key_pattern(text)
    assert (made.prefix, made.simple) == (prefix, simple)
    assert made.matches(yes)
    assert no is None or not made.matches(no)


@pytest.mark.parametrize(
    ("request_", "argc", "words"),
    [
        (b"*3\r\n$3\r\nset\r\n$4\r\nname\r\n$7\r\nos-work\r\n", 3, "set name os-work"),
        (b"*3\r\n$3\r\nset\r\n$4\r\nname\r\n$7\r\n", 3, "set name <7 bytes>"),
        (b"*5\r\n$4\r\nmset\r\n$1\r\na\r\n$1\r\n", 5, "mset a <1 bytes> (+2)"),
        (b"*2\r\n$3\r\nget\r\n$0\r\n\r\n", 2, 'get ""'),
        (b"set name value\r\n", 3, "set name value"),
        (b"*2\r\n$3\r\nget\r\n$4\r\n\x1b[2J\r\n", 2, 'get "\\x1b[2J"'),
        (b"", 2, "get (+2)"),
    ],
)
def test_requests_in_words(request_: bytes, argc: int, words: str) -> None:
    assert events.request_words(event(request_, argc=argc)) == words


@pytest.mark.parametrize(
    ("reply", "size", "words"),
    [
        (b"+OK\r\n", None, "+OK"),
        (b"-WRONGTYPE Operation", 60, "-WRONGTYPE Operation…"),
        (b"$-1\r\n", None, "(nil)"),
        (b"_\r\n", None, "(nil)"),
        (b"$64\r\n", 71, "<64 bytes>"),
        (b"$2\r\nhi\r\n", None, "hi"),
        (b"*2\r\n$1\r\na\r\n:1\r\n", None, "[a, 1]"),
        (b"*2\r\n", 15, "(array of 2)"),
        (b"%1\r\n+a\r\n:1\r\n", None, "[a: 1]"),
        (b",3.5\r\n", None, ",3.5"),
    ],
)
def test_replies_in_words(reply: bytes, size: int | None, words: str) -> None:
    assert events.reply_words(event(b"", reply, size=size)) == words


def test_the_line() -> None:
    made = event(b"*3\r\n$3\r\nset\r\n$4\r\nname\r\n$7\r\nos-work\r\n", argc=3)
    assert events.line(made) == "set name os-work  +OK  21.4 µs (queue 9.1, exec 1.2, reply 11.1)"


def test_a_table_of_recorded_events() -> None:
    made = monitor.of_events([event(b""), event(b"", b"-ERR x\r\n")])
    assert made.commands["GET"].calls == 2
    assert made.commands["GET"].errors == 1
    assert not made.lost


@pytest.mark.parametrize(
    "content", [b"", b"{}\n", b'{"what": "kflex-repro monitor", "schema": 1}\n', b"\xff" * 99]
)
def test_files_that_are_no_recordings(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x"
    file.write_bytes(content)
    with pytest.raises(KflexError, match="not a recording"):
        Recording(file)
