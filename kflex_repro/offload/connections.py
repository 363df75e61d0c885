"""Each connection of a session: is it served, and if not, why? The kernel's list joined with Redis's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from kflex_repro.errors import KflexError
from kflex_repro.offload import clients, netns
from kflex_repro.offload.clients import Client

if TYPE_CHECKING:
    from kflex_repro.offload.session import Session

SERVED, PASSING = "served", "passing"
_NOT_ENROLLED = "not adopted: of another host, or it did not rest (offload start tries again)"


@dataclass(frozen=True)
class Connection:
    """One connection. ``state`` is served or passing; ``why`` says why it is passing, "" when it is not.

    ``served`` counts requests, ``passed`` messages, since it was enrolled or adopted. ``id``, ``name`` and
    ``user`` are Redis's (0 and "" when it was not asked).
    """

    client: str
    server: str
    state: str
    why: str
    served: int
    passed: int
    adopted: bool
    id: int = 0
    user: str = ""
    name: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def read(session: Session) -> list[Connection]:
    """The connections of a session, those that Redis lists and those that only the kernel knows.

    When Redis does not answer, those that the kernel knows. KflexError for a table of another version.
    """
    enrolled = session.connections()
    listed: list[Client] | None = None
    run_id = session.full_run_id() if session.mode == "coherent" and session.server_alive else ""
    if run_id:
        try:
            listed = list(clients.everyone(run_id, session.btf, netns.of(session.pid)))
        except (KflexError, OSError):
            listed = None
    return join(enrolled, listed, state_of(session))


@dataclass(frozen=True)
class Common:
    """What holds for all connections: ``hindrance`` for the whole session, which slots may GET or SET."""

    hindrance: str
    allowed: frozenset[int]
    none: int
    park: int
    constants: Mapping[str, int]


def state_of(session: Session) -> Common:
    """What the session's control block says of every connection."""
    hindrance = ""
    if not session.server_alive:
        hindrance = "the server is gone"
    elif session.disabled != "on":
        hindrance = f"the offload is {session.disabled}"
    elif not session.allow:
        hindrance = "forbidden by " + ", ".join(session.rules)
    constants = session.btf.constants()
    return Common(
        hindrance=hindrance,
        allowed=session.slots_allowed(),
        none=constants["KFLEX_USER_NONE"],
        park=constants["KFLEX_PARK"],
        constants=constants,
    )


def join(enrolled: Iterable[Any], listed: Sequence[Client] | None, common: Common) -> list[Connection]:
    """Both lists as one, by addresses and ports; ``listed`` is None when Redis was not asked."""
    by_key: dict[bytes, Any] = {}
    for conn in enrolled:
        key = clients.TUPLE.pack(
            bytes(conn.client), bytes(conn.server), int(conn.ports) >> 16, int(conn.ports) & 0xFFFF
        )
        by_key[key] = conn
    found = []
    for client in listed or ():
        conn = by_key.pop(client.key, None) if client.key else None
        if conn is not None:
            found.append(_enrolled(conn, client, common))
            continue
        wrong = clients.hindrance(client)
        why = _NOT_ENROLLED if wrong is None else f"not adopted: {wrong.text}"
        found.append(
            Connection(
                client.addr, client.laddr, PASSING, why, 0, 0, False, client.id, client.user, client.name
            )
        )
    for conn in by_key.values():
        # Redis has no such client any more (or was not asked): its sockets are about to close.
        if listed is None:
            found.append(_enrolled(conn, None, common))
    return found


def _enrolled(conn: Any, client: Client | None, common: Common) -> Connection:
    ports = int(conn.ports)
    why = why_passing(conn, client, common)
    return Connection(
        client=clients.unpacked(bytes(conn.client), ports >> 16),
        server=clients.unpacked(bytes(conn.server), ports & 0xFFFF),
        state=PASSING if why else SERVED,
        why=why,
        served=int(conn.served),
        passed=int(conn.passed),
        adopted=bool(conn.adopted),
        id=client.id if client else 0,
        user=client.user if client else "",
        name=client.name if client else "",
    )


def why_passing(conn: Any, client: Client | None, common: Common) -> str:
    """Why a struct kflex_conn_info is not served, "" when its next GET or SET may be."""
    const = common.constants
    last = bytes(conn.name).split(b"\0")[0].decode(errors="replace").upper()
    if common.hindrance:
        return common.hindrance
    if conn.cflags & const["KFLEX_C_DEMOTED"]:
        if conn.idle > common.park:
            return f"parked: no GET or SET among its last {common.park} messages"
        wrong = clients.hindrance(client) if client else None
        said = wrong.text if wrong else f"its last command was {last}" if last else "framing not followed"
        return f"demoted: {said}"
    if conn.sflags & const["KFLEX_S_DEMOTED"]:
        return "demoted: its replies could not be followed"
    if not conn.paired:
        return "its server socket is not known"
    if conn.user == common.none or conn.user not in common.allowed:
        return f"user {client.user if client else ''} may not GET and SET every key".replace("  ", " ")
    if not conn.requests or not conn.sflags & const["KFLEX_S_OWNED"]:
        return "new: its first request always passes"
    if conn.cflags & const["KFLEX_C_MULTI"]:
        return "in MULTI"
    return ""


def summary(rows: Sequence[Connection]) -> dict[str, int]:
    """How many are served, and how many pass for each reason."""
    counts = Counter(row.why for row in rows if row.state == PASSING)
    return {SERVED: sum(row.state == SERVED for row in rows), **dict(counts.most_common())}


def render(
    rows: Sequence[Connection],
    before: Mapping[str, Connection] | None = None,
    seconds: float = 1.0,
    limit: int = 0,
) -> Table:
    """A table for people: the busiest first, ``limit`` rows at most (0: all).

    With the rows of ``seconds`` ago by client address, a column with the rate.
    """

    def rate(row: Connection) -> float:
        old = before.get(row.client) if before else None
        return (row.served - old.served) / seconds if old and row.served >= old.served else 0.0

    served = sum(row.state == SERVED for row in rows)
    title = f"{len(rows):,} connections: {served:,} served, {len(rows) - served:,} passing"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column("client", no_wrap=True)
    table.add_column("user", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("served", justify="right", no_wrap=True)
    if before is not None:
        table.add_column("/s", justify="right", no_wrap=True)
    table.add_column("passed", justify="right", no_wrap=True)
    # One line each where rows are counted.
    table.add_column("why", overflow="ellipsis" if limit else "fold", no_wrap=bool(limit))
    shown = sorted(rows, key=lambda row: (-rate(row), -row.served, row.state, row.client))
    for row in shown[: limit or None]:
        state = Text(row.state, style="green" if row.state == SERVED else "yellow")
        if row.adopted:
            state.append(" (adopted)", style="dim")
        cells: list[str | Text] = [_label(row), row.user, state, f"{row.served:,}"]
        if before is not None:
            cells.append(f"{rate(row):,.0f}")
        table.add_row(*cells, f"{row.passed:,}", row.why)
    hidden = shown[limit:] if limit else []
    if hidden:
        table.caption_justify = "left"
        table.caption = f"and {len(hidden):,} more: --connections shows all"
    return table


def _label(row: Connection) -> str:
    return f"{row.client} {row.name}".strip()


def reasons(rows: Sequence[Connection]) -> Table:
    """How many pass for each reason."""
    table = Table("not served because", "connections", box=None, padding=(0, 2, 0, 0))
    table.columns[1].justify = "right"
    for why, count in summary(rows).items():
        if why != SERVED:
            table.add_row(why, f"{count:,}")
    return table
