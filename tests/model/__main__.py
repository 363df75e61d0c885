"""``python -m tests.model [BREAK]``: explores the protocol, or shows how breaking it goes wrong."""

from __future__ import annotations

import sys

from .explore import explore
from .protocol import Break, Protocol
from .test_protocol import BROKEN, RIGHT


def main() -> int:
    names = sys.argv[1:]
    unknown = [name for name in names if name not in Break.__members__]
    if unknown:
        print(f"{unknown[0]} is none of {', '.join(Break.__members__)}", file=sys.stderr)
        return 2
    for name in names:
        bounds, _ = BROKEN[Break[name]]
        system = Protocol(bounds, Break[name])
        result = explore(system.start(), system.successors)
        print(f"{name}: {Break[name].value}. {result.states} states")
        print(*(f"  {i:2} {step}" for i, step in enumerate(result.trace, 1)), sep="\n")
        print(f"  => {result.violation}")
    if not names:
        for bounds in RIGHT:
            system = Protocol(bounds)
            result = explore(system.start(), system.successors)
            print(f"{bounds}: {result.states} states, {result.steps} steps, violation: {result.violation}")
    return 0


sys.exit(main())
