"""What `offload status` says of a session: as data, and as rich tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kflex_repro.errors import KflexError
from kflex_repro.offload.session import Session

_USERS_SHOWN = 8

# Why a message was passed to Redis, in words.
WHY = {
    "why_off": "the rules or a stop forbid it",
    "why_new": "first request of a connection, or not paired",
    "why_unanswered": "an earlier request waits for Redis",
    "why_unread": "the client has replies of Redis to read",
    "why_multi": "inside MULTI",
    "why_other": "not a plain GET or SET",
    "why_size": "key, value, pipeline or message too large",
    "why_miss": "GET of a key that is not in the table",
    "why_gate": "SET while Redis executes",
    "why_held": "SET while a cut is taken or overdue",
    "why_locked": "bucket contended (or SET and GET of one key in one pipeline)",
    "why_full": "table or dirty ring full",
    "why_nomem": "no page for the reply",
    "why_backlog": "too many unread replies",
    "why_closing": "connection closing",
    "why_user": "not logged in, or its user may not do that with every key",
    "why_demoted": "demoted connection",
}

# What each rule means and how to lift it.
RULES = {
    "version": "server version not known good (7.0 is)",
    "module": "another module is loaded",
    "cluster": "cluster mode",
    "replica": "the server is a replica",
    "auth": "no user may GET or SET every key (ACL)",
    "renamed": "GET, SET or CONFIG renamed or disabled",
    "timeout": "timeout is not 0: kernel-served clients look idle",
    "monitor": "a MONITOR client is connected",
    "paused": "CLIENT PAUSE or FAILOVER",
    "loading": "a dataset is being loaded",
    "recheck": "an administrative command is running",
    "appendfsync": "appendonly yes with appendfsync always",
    "maxmemory": "maxmemory is set",
    "min_replicas": "min-replicas-to-write is set",
    "notify": "notify-keyspace-events is set",
    "replicas": "replicas are connected: WAIT would lie (never used? kflex.set-with-replicas yes)",
    "disk": "writes are stopped by a failed save",
    "aof_error": "the last AOF write failed",
    "tracking": "a client tracks keys",
    "set_setting": "kflex.set-offload is no",
    "journal": "the AOF does not name this table yet (a moment after start)",
}


def as_dict(session: Session) -> dict[str, Any]:
    """All that is known of a session, for --json. Bytes, counts, microseconds; ratios 0.0-1.0."""
    if not session.readable:
        raise KflexError(
            f"attached by another version of kflex-repro (ABI {session.abi})",
            session.server_id,
            "take it off: kflex-repro offload stop",
        )
    stats = session.stats()
    served = stats["served_get"] + stats["served_set"]
    requests = served + stats["passed"]
    return {
        "server_id": session.server_id,
        "port": session.port,
        "pid": session.pid,
        "netns": session.netns_inode,
        "mode": session.mode,
        "server_alive": session.server_alive,
        "state": session.disabled,
        "serves": sorted(session.allow) if session.disabled == "on" else [],
        "users": {name: sorted(what) for name, what in session.users().items()},
        "users_full": session.users_full,
        "rules": {rule: RULES.get(rule, rule) for rule in session.rules},
        "table_bytes": session.table_bytes,
        "gate_open_ratio": round(session.gate_open_ratio, 4),
        "served_share": round(served / requests, 4) if requests else 0.0,
        "unread_connections": len(session.unread()),
        "stats": stats,
    }


def render(data: Mapping[str, Any]) -> RenderableType:
    """The same for people."""
    stats: Mapping[str, int] = data["stats"]
    if not data["server_alive"]:
        state = Text("the server is gone: offload stop takes this off", style="bold red")
    elif data["state"] != "on":
        state = Text(f"{data['state']}: everything passes", style="bold yellow")
    elif data["serves"] == ["get", "set"]:
        state = Text("serving GET and SET", style="bold green")
    elif data["serves"]:
        state = Text("serving GET only", style="bold yellow")
    else:
        state = Text("serving nothing", style="bold yellow")
    head = Table.grid(padding=(0, 2))
    place = f", in network namespace {data['netns']}" if data["netns"] else ""
    head.add_row("port", f"{data['port']} (pid {data['pid']}, {data['mode']}{place})")
    head.add_row("state", state)
    for text in data["rules"].values():
        head.add_row("", f"because {text}")
    head.add_row("users", _users(data))
    head.add_row(
        "served",
        f"{data['served_share']:.1%} of {stats['served_get'] + stats['served_set'] + stats['passed']:,}",
    )
    head.add_row(
        "", f"GET {stats['served_get']:,}   SET {stats['served_set']:,}   passed {stats['passed']:,}"
    )
    head.add_row(
        "in Redis",
        f"{stats['drained']:,} keys in {stats['cuts']:,} cuts, {stats['dirty']:,} waiting, "
        f"oldest ever {stats['dirty_age_us_max'] / 1000:.1f} ms",
    )
    head.add_row("gate", f"open {data['gate_open_ratio']:.1%} of the time")
    head.add_row("table", f"{stats['table_bytes_used'] >> 20} of {data['table_bytes'] >> 20} MiB used")
    if stats["open_commands"] or stats["refused"] or stats["lost"]:
        head.add_row(
            Text("BUG", style="bold red"),
            f"commands with the gate open {stats['open_commands']}, refused SETs {stats['refused']}, "
            f"lost replies {stats['lost']}: please report this",
        )
    reasons = Table("passed because", "messages", box=None, padding=(0, 2))
    reasons.columns[1].justify = "right"
    for key, text in WHY.items():
        if stats[key]:
            reasons.add_row(text, f"{stats[key]:,}")
    return Group(head, reasons) if reasons.row_count else head


def _users(data: Mapping[str, Any]) -> Text:
    """Whose requests may be served: with many users, how many more there are."""
    names = []
    for name, what in data["users"].items():
        # A terminal obeys what some names hold.
        shown = name if name.isprintable() else repr(name)[1:-1]
        names.append(shown if what == ["get", "set"] else f"{shown} ({what[0].upper()} only)")
    shown = ", ".join(names[:_USERS_SHOWN]) or "none"
    if len(names) > _USERS_SHOWN:
        shown += f" and {len(names) - _USERS_SHOWN} more"
    if data["users_full"]:
        shown += "; no room for other names until the next start"
    # Not markup: a name may hold brackets.
    return Text(shown)
