"""A message that TCP takes in parts never makes the program answer out of order."""

from __future__ import annotations

import pytest

from .explore import Exploration, explore
from .stream import NOT_A_REQUEST, OVERTAKES, Break, Connection, streams


def _explored(*breaks: Break, longest: int = 6) -> list[tuple[str, Exploration]]:
    results = []
    for length in range(1, longest + 1):
        for stream in streams(length):
            connection = Connection(stream, *breaks)
            results.append((stream, explore(connection.start(), connection.successors)))
    return results


def test_resent_tails_are_never_served() -> None:
    results = _explored()
    assert [result for _, result in results if result.violation] == []
    # Not because nothing was served.
    assert (
        Connection("GG").successors((1, 1, 0, 1, 1, 0, 0, 1, 1, 0))[0][0]
        == "the client sends G, the kernel answers"
    )


@pytest.mark.parametrize(
    ("broken", "expected"),
    [(Break.NO_WRITE_SEQ, {OVERTAKES, NOT_A_REQUEST}), (Break.NO_REPLY_COUNT, {OVERTAKES})],
    ids=lambda value: getattr(value, "name", None),
)
def test_breaking_it_is_found(broken: Break, expected: set[str]) -> None:
    found = [(stream, result) for stream, result in _explored(broken) if result.violation]
    stream, result = min(found, key=lambda each: len(each[1].trace))
    print(f"{broken.value}: stream {stream}", *result.trace, f"=> {result.violation}", sep="\n")
    assert {result.violation for _, result in found} <= expected
    assert found
