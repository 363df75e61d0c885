"""Order on one connection, as a transition system: a client that may have to send a message's tail again.

The program sees a message before TCP has taken it. If TCP takes less (a full send buffer), the client sends
the rest again, and a program that has counted it already is out of step with what Redis gets. Requests are
shortened to tokens: G is a whole GET; 1 or 2 is the head of a SET whose value is the next 1 or 2 tokens.
"""

from __future__ import annotations

from enum import Enum
from itertools import product

from .explore import State, Step


class Break(Enum):
    NO_WRITE_SEQ = "the program does not look whether TCP took what it has counted"
    NO_REPLY_COUNT = "the program does not wait until Redis has answered what was passed"


# Places in a state. SENT: tokens that the client has got rid of; TAKEN: those of them that TCP took.
SENT, TAKEN, SKIP, REQUESTS, EXPECT, DEMOTED, REDIS_SKIP, RECEIVED, ANSWERED, SHORT = range(10)
SHORT_SENDS = 2  # how often TCP takes less than it was given

OVERTAKES = "a reply of the kernel overtakes one of Redis"
NOT_A_REQUEST = "a part of a value is taken for a request"


def streams(length: int) -> list[str]:
    """All streams of so many tokens that are whole requests."""
    return ["".join(s) for s in product("G12", repeat=length) if _whole(s)]


def _whole(tokens: tuple[str, ...]) -> bool:
    skip, _ = _feed(0, 0, "".join(tokens))
    return not skip


def _feed(skip: int, frames: int, tokens: str) -> tuple[int, int]:
    """The framing parser, of the program and of Redis alike."""
    for token in tokens:
        if skip:
            skip -= 1
            frames += not skip
        elif token == "G":
            frames += 1
        else:
            skip = int(token)
    return skip, frames


class Connection:
    def __init__(self, stream: str, *breaks: Break) -> None:
        self.stream = stream
        self.check_seq = Break.NO_WRITE_SEQ not in breaks
        self.check_replies = Break.NO_REPLY_COUNT not in breaks

    def start(self) -> State:
        return (0, 0, 0, 0, -1, 0, 0, 0, 0, 0)

    def successors(self, s: State) -> list[Step]:
        out: list[Step] = []
        if s[ANSWERED] < s[RECEIVED]:
            n = list(s)
            n[ANSWERED] += 1
            out.append(("Redis answers, the client reads it", tuple(n), None))
        for end in range(s[SENT] + 1, len(self.stream) + 1):
            self._send(s, self.stream[s[SENT] : end], out)
        return out

    def _send(self, s: State, message: str, out: list[Step]) -> None:
        n = list(s)
        if self.check_seq and s[EXPECT] not in (-1, s[TAKEN]):
            n[DEMOTED] = 1
        answered = s[ANSWERED] == s[REQUESTS] or not self.check_replies
        if message == "G" and s[REQUESTS] and not s[SKIP] and answered and not n[DEMOTED]:
            n[SENT] += 1
            violation = None
            if _feed(0, 0, self.stream[: s[SENT]])[0]:
                violation = NOT_A_REQUEST
            elif s[ANSWERED] < s[RECEIVED]:
                violation = OVERTAKES
            out.append(("the client sends G, the kernel answers", tuple(n), violation))
            return
        if not n[DEMOTED]:
            n[SKIP], n[REQUESTS] = _feed(s[SKIP], s[REQUESTS], message)
            n[EXPECT] = s[TAKEN] + len(message)
        for taken in range(0 if s[SHORT] < SHORT_SENDS else len(message), len(message) + 1):
            m = n.copy()
            m[SHORT] += taken < len(message)
            m[SENT] += taken
            m[TAKEN] += taken
            m[REDIS_SKIP], m[RECEIVED] = _feed(s[REDIS_SKIP], s[RECEIVED], message[:taken])
            out.append((f"the client sends {message}, it passes, TCP takes {taken}", tuple(m), None))
