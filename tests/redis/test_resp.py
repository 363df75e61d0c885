"""The RESP codec: what it accepts, what it refuses, and that it does not care how the bytes are cut."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kflex_repro.redis.resp import (
    MAX_LINE,
    Attribute,
    Decoder,
    ErrorReply,
    Map,
    ProtocolError,
    Push,
    Set,
    Simple,
    Verbatim,
    encode_command,
    encode_pipeline,
    encode_reply,
    strictly_equal,
)

pieces = st.integers(1, 7)
lines = st.binary(max_size=40).map(lambda data: data.replace(b"\r", b"").replace(b"\n", b""))
scalars = st.one_of(
    st.none(),
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.binary(max_size=200),
    lines.map(Simple),
    lines.map(ErrorReply),
)
resp2 = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4), max_leaves=12)
resp3_scalars = st.one_of(
    scalars,
    st.booleans(),
    st.floats(),
    st.integers(),
    st.binary(max_size=40).map(Verbatim),
    st.binary(max_size=40).map(ErrorReply),
)
resp3 = st.recursive(
    resp3_scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(Set),
        st.lists(inner, max_size=4).map(Push),
        st.lists(st.tuples(inner, inner), max_size=3).map(Map),
    ),
    max_leaves=12,
)


def decode(data: bytes) -> list[object]:
    decoder = Decoder()
    decoder.feed(data)
    replies = list(decoder)
    assert decoder.between_replies, f"{decoder.pending} bytes left"
    return replies


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"+OK\r\n", Simple(b"OK")),
        (b"+\r\n", Simple(b"")),
        (b"-ERR no\r\n", ErrorReply(b"ERR no")),
        (b":0\r\n", 0),
        (b":-9223372036854775808\r\n", -(1 << 63)),
        (b"$0\r\n\r\n", b""),
        (b"$2\r\n\r\n\r\n", b"\r\n"),
        (b"$-1\r\n", None),
        (b"*-1\r\n", None),
        (b"*0\r\n", []),
        (b"*2\r\n*1\r\n:1\r\n$-1\r\n", [[1], None]),
        (b"_\r\n", None),
        (b"#t\r\n", True),
        (b"#f\r\n", False),
        (b",1.5e3\r\n", 1500.0),
        (b",-inf\r\n", -math.inf),
        (b",10\r\n", 10.0),
        (b"(-3492890328409238509324850943850943825024385\r\n", -3492890328409238509324850943850943825024385),
        (b"!5\r\nERR \n\r\n", ErrorReply(b"ERR \n")),
        (b"=7\r\ntxt:abc\r\n", Verbatim(b"abc", "txt")),
        (b"%1\r\n+a\r\n:1\r\n", Map([(Simple(b"a"), 1)])),
        (b"~2\r\n:1\r\n:1\r\n", Set([1, 1])),
        (b">1\r\n+x\r\n", Push([Simple(b"x")])),
        (b"*2\r\n|1\r\n+ttl\r\n:5\r\n:1\r\n:2\r\n", [1, 2]),
    ],
)
def test_known_frames(data: bytes, value: object) -> None:
    (reply,) = decode(data)
    assert strictly_equal(reply, value), reply


def test_an_attribute_before_a_reply_is_a_frame_of_its_own() -> None:
    assert decode(b"|1\r\n+ttl\r\n:5\r\n$1\r\nx\r\n") == [Attribute([(Simple(b"ttl"), 5)]), b"x"]


@pytest.mark.parametrize(
    "data",
    [
        b"OK\r\n",
        b"\r\n",
        b"\n",
        b"+OK\n",
        b"+O\rK\r\n",
        b":\r\n",
        b":+1\r\n",
        b":01\r\n",
        b":-0\r\n",
        b": 1\r\n",
        b":9223372036854775808\r\n",
        b"$-2\r\n",
        b"$03\r\nabc\r\n",
        b"$3\r\nabcd\r\n",
        b"$3\r\nabc\n\r",
        b"$536870913\r\n",
        b"!-1\r\n",
        b"=3\r\ntxt\r\n",
        b"=4\r\ntxt;\r\n",
        b"*1048577\r\n",
        b"*-2\r\n",
        b"%-1\r\n",
        b"~-1\r\n",
        b"_x\r\n",
        b"#T\r\n",
        b",1.\r\n",
        b",.5\r\n",
        b",1e\r\n",
        b",1e--5\r\n",
        b",NaN\r\n",
        b"(1.0\r\n",
        b"(" + b"1" * 4001 + b"\r\n",
        b"?",
        b"*1\r\n" * 40 + b":1\r\n",
        b"+" + b"x" * (MAX_LINE + 1),
    ],
)
def test_what_is_not_resp_is_refused_and_stays_refused(data: bytes) -> None:
    decoder = Decoder()
    decoder.feed(data)
    with pytest.raises(ProtocolError):
        list(decoder)
    decoder.feed(b"+OK\r\n")
    with pytest.raises(ProtocolError):
        decoder.pop()


def test_an_error_names_the_byte() -> None:
    decoder = Decoder()
    decoder.feed(b"+OK\r\n+OK\r\n?")
    assert decoder.pop() == b"OK"
    assert decoder.pop() == b"OK"
    with pytest.raises(ProtocolError, match="at byte 10 of the stream"):
        decoder.pop()


def test_commands() -> None:
    assert encode_command("SET", b"k\x00", 12) == b"*3\r\n$3\r\nSET\r\n$2\r\nk\x00\r\n$2\r\n12\r\n"
    assert encode_command("x", 1.5, "é", "") == b"*4\r\n$1\r\nx\r\n$3\r\n1.5\r\n$2\r\n\xc3\xa9\r\n$0\r\n\r\n"
    assert encode_pipeline([("PING",), ("GET", "k")]) == encode_command("PING") + encode_command("GET", "k")
    with pytest.raises(TypeError):
        encode_command("SET", "k", True)


@pytest.mark.parametrize(
    "value", [True, 1.5, 1 << 70, Map([]), Set([]), Push([]), Verbatim(b"x"), ErrorReply(b"a\r\n")]
)
def test_resp2_cannot_say_it(value: object) -> None:
    with pytest.raises(TypeError):
        encode_reply(value)
    assert strictly_equal(decode(encode_reply(value, resp3=True)), [value])


@given(st.lists(resp2, max_size=4), pieces)
def test_resp2_survives_any_cut(values: list[object], size: int) -> None:
    data = b"".join(encode_reply(value) for value in values)
    decoder, out = Decoder(), []
    for at in range(0, len(data), size):
        decoder.feed(data[at : at + size])
        out += list(decoder)
    assert strictly_equal(out, values)
    assert decoder.between_replies


@given(resp3, pieces)
def test_resp3_survives_any_cut(value: object, size: int) -> None:
    data = encode_reply(value, resp3=True)
    decoder, out = Decoder(), []
    for at in range(0, len(data), size):
        decoder.feed(data[at : at + size])
        out += list(decoder)
    assert strictly_equal(out, [value])


@given(resp2)
def test_every_proper_prefix_is_incomplete(value: object) -> None:
    data = encode_reply(value)
    for end in range(len(data)):
        decoder = Decoder()
        decoder.feed(data[:end])
        assert decoder.pop() is Decoder.INCOMPLETE
        assert not decoder.pop()


@given(st.binary(max_size=60))
@settings(max_examples=300)
def test_random_bytes_end_in_replies_or_a_protocol_error(data: bytes) -> None:
    decoder = Decoder()
    decoder.feed(data)
    try:
        replies = list(decoder)
    except ProtocolError as error:
        assert 0 <= error.offset <= len(data)
    else:
        assert len(replies) <= len(data) // 3


@given(st.lists(st.lists(st.binary(max_size=60), min_size=1, max_size=4), min_size=1, max_size=4))
def test_a_command_reads_back_as_an_array_of_bulks(commands: list[list[bytes]]) -> None:
    assert decode(encode_pipeline(commands)) == commands


def test_a_long_stream_is_not_kept() -> None:
    decoder = Decoder()
    reply = encode_reply(b"x" * 1000)
    for _ in range(2000):
        decoder.feed(reply)
        assert decoder.pop() == b"x" * 1000
    assert len(decoder._buffer) < 200_000


def test_strict_equality_tells_types_apart() -> None:
    assert not strictly_equal(Simple(b"OK"), b"OK")
    assert not strictly_equal(1, True)
    assert not strictly_equal([1], Set([1]))
    assert not strictly_equal(Verbatim(b"x", "txt"), Verbatim(b"x", "mkd"))
    assert strictly_equal(math.nan, math.nan)
