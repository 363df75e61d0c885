"""The checker finds a server that lies, and only such a server."""

from __future__ import annotations

import threading

import pytest

from kflex_repro.bench.checker import CHECK_PREFIX, COHERENT_OPS, STORE_OPS, Checked, Checker, Model, encode
from tests.unit.bench_fakes import FakeRedis


def run(server: FakeRedis, ops: tuple[str, ...] = COHERENT_OPS, enough: int = 300) -> Checked:
    """Let a fast checker do about ``enough`` operations."""
    checker = Checker("127.0.0.1", server.port, rate=1e6, ops=ops, seed=1)
    checker.start()
    done = threading.Event()
    while checker._ops_done < enough and checker._thread.is_alive():
        done.wait(0.005)
    return checker.stop()


@pytest.mark.parametrize("ops", [COHERENT_OPS, STORE_OPS])
def test_an_honest_server_has_no_mismatch(ops: tuple[str, ...]) -> None:
    with FakeRedis() as server:
        found = run(server, ops)
    assert found.ops >= 300
    assert (found.mismatches, found.examples) == (0, ())


def test_a_stale_get_is_found() -> None:
    seen: dict[bytes, bytes | None] = {}

    def stale(args: list[bytes], answer: bytes | None) -> bytes | None:
        # The first value that each key ever had.
        return seen.setdefault(args[1], answer) if args[0] == b"GET" else answer

    with FakeRedis(stale) as server:
        found = run(server)
    assert found.mismatches > 0
    assert "expected" in found.examples[0]


def test_a_wrong_counter_is_found() -> None:
    with FakeRedis(lambda args, answer: b":0" if args[0] == b"INCR" else answer) as server:
        assert run(server).mismatches > 0


def test_no_server_is_a_mismatch_not_a_hang() -> None:
    with FakeRedis() as server:
        port = server.port
    checker = Checker("127.0.0.1", port)
    checker.start()
    checker._thread.join(10)
    found = checker.stop()
    assert found.mismatches == 1
    assert "connection failed" in found.examples[0]


def test_it_writes_only_its_own_keys() -> None:
    touched: set[bytes] = set()

    def note(args: list[bytes], answer: bytes | None) -> bytes | None:
        touched.add(args[1])
        return answer

    with FakeRedis(note) as server:
        run(server)
    assert touched
    assert all(key.startswith(CHECK_PREFIX.encode()) for key in touched)


def test_checks_add_up() -> None:
    assert Checked(1, 1, ("a",)) + Checked(2, 0) == Checked(3, 1, ("a",))


def test_the_model_answers_like_redis() -> None:
    model = Model()
    assert model.apply([b"GET", b"k"]) is None
    assert model.apply([b"APPEND", b"k", b"ab"]) == b":2"
    assert model.apply([b"INCR", b"k"]) == b"-ERR value is not an integer or out of range"
    assert model.apply([b"SET", b"k", b"9"]) == b"+OK"
    assert model.apply([b"INCR", b"k"]) == b":10"
    assert model.apply([b"GET", b"k"]) == b"10"
    assert model.apply([b"DEL", b"k"]) == b":1"
    assert model.apply([b"DEL", b"k"]) == b":0"


def test_encode_is_resp() -> None:
    assert encode([b"SET", b"k", b""]) == b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$0\r\n\r\n"
