"""``kflex-repro offload``."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live

from kflex_repro import build
from kflex_repro.errors import KflexError, Unavailable
from kflex_repro.offload import attach, connections, netns, places, session, status, systemd, table, target
from kflex_repro.offload import install as installation
from kflex_repro.offload import recover as journal

_PORT = click.option(
    "--port", type=click.IntRange(1, 65535), default=6379, show_default=True, help="Redis port."
)

F = TypeVar("F", bound=Callable[..., object])


def _where(command: F) -> F:
    """The options that name the server's network namespace."""
    command = click.option(
        "--netns",
        "netns_name",
        metavar="NAME|PATH",
        help="The server's network namespace: a name of `ip netns`, or a path.",
    )(command)
    return click.option(
        "--pid",
        type=click.IntRange(1),
        help="The same by a process in it, as this host sees it (docker inspect -f {{.State.Pid}} NAME).",
    )(command)


def _namespace(pid: int | None, name: str | None) -> netns.Namespace | None:
    if pid is not None and name is not None:
        raise click.UsageError("--pid and --netns say the same thing: give one")
    return netns.of(pid) if pid is not None else netns.named(name) if name is not None else None


def _chosen(port: int | None, where: netns.Namespace | None) -> list[session.Session]:
    """The attached sessions of this port and namespace, of all where they are not given."""
    return [s for s in session.attached() if port in (None, s.port) and (where is None or s.is_in(where))]


@click.group("offload")
def group() -> None:
    """Serve GET and SET of a running redis-server in the kernel.

    The server must be Redis 7.0 with the module loaded: `install` sees to that. Clients on this host that
    connect after `start` are served, those that are connected already are taken over where that is safe.
    """


def _need_root() -> None:
    if os.geteuid() != 0:
        raise Unavailable("the offload needs root", "kflex-repro offload", "run it with sudo")


def _login(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say who we are to a server with a password; the password itself is never an argument."""
    for option in (
        click.option("--askpass", is_flag=True, help="Ask for the password at the terminal."),
        click.option(
            "--user",
            metavar="NAME",
            help="Redis user that may run INFO (default: default). Password: $REDISCLI_AUTH, or --askpass.",
        ),
    ):
        command = option(command)
    return command


def _ask_login(user: str | None, askpass: bool) -> target.Login | None:
    if askpass:
        try:
            password = click.prompt(
                "Redis password", hide_input=True, err=True, default="", show_default=False
            )
        except click.Abort:
            raise KflexError("no password was given", "--askpass", "or put it into REDISCLI_AUTH") from None
    elif found := os.environ.get("REDISCLI_AUTH"):
        password = found
    elif user is not None:
        raise KflexError(
            f"no password for user {user!r}", "--user", "--askpass, or put it into REDISCLI_AUTH"
        )
    else:
        return None
    return target.Login(user or "default", password)


@group.command()
@_PORT
@click.option("--host", default="127.0.0.1", show_default=True, help="A local address of the server.")
@_where
@click.option(
    "--table-size",
    default="auto",
    show_default=True,
    metavar="SIZE",
    help="RAM for the table, taken at once: e.g. 256m; auto: the server's setting kflex.table-size, or, if "
    "that is 0, an eighth of what is free, at most 1g.",
)
@_login
@click.option(
    "--adopt/--no-adopt",
    "take_over",
    default=True,
    show_default=True,
    help="Take over the connections that are there already, as far as they are at rest.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done; change nothing.")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON.")
def start(
    port: int,
    host: str,
    pid: int | None,
    netns_name: str | None,
    table_size: str,
    user: str | None,
    askpass: bool,
    take_over: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Start (idempotent). It stays when this command ends, and ends with `stop` or with the server.

    Started again it takes over the connections that are not served yet.
    """
    _need_root()
    where = _namespace(pid, netns_name)
    login = _ask_login(user, askpass)
    size = table.parse_size(table_size)
    if dry_run:
        found = target.probe(port, host, login=login, inside=where)
        attach.check_coherent(found)
        plan = attach.choose_table(found, size)
        known = session.find(port, found.where)
        click.echo(
            f"{'already attached to' if known else 'would attach to'} {found.software} {found.version} "
            f"at {host}:{port} (pid {found.pid}), table {plan.bytes >> 20} MiB: "
            f"about {plan.typical_entries:,} keys of 16 and values of 64 bytes"
        )
        return
    with Console(stderr=True).status("attaching"):
        made = attach.start(port, host, table_bytes=size, login=login, where=where, take_over=take_over)
    try:
        if as_json:
            adoption = made.adoption.as_dict() if made.adoption is not None else None
            click.echo(json.dumps({**status.as_dict(made), "adoption": adoption}, indent=2))
        else:
            console = Console(soft_wrap=True)
            console.print(status.render(status.as_dict(made)))
            if made.adoption is not None:
                console.print(str(made.adoption), highlight=False, markup=False)
    finally:
        made.close()


@group.command("status")
@click.option(
    "--port", type=click.IntRange(1, 65535), help="Only this server (default: all that are attached)."
)
@_where
@click.option("--json", "as_json", is_flag=True, help="As JSON: a list with one object for each server.")
@click.option("--connections", "each", is_flag=True, help="Each connection: served, or passing and why.")
@click.option(
    "--watch", is_flag=True, help="Refresh every second until Ctrl-C, with the busiest connections."
)
def show(
    port: int | None, pid: int | None, netns_name: str | None, as_json: bool, each: bool, watch: bool
) -> None:
    """What is attached, what is served, what is not and why. Exit code 1 when nothing is attached."""
    _need_root()
    if watch and as_json:
        raise KflexError("--watch is for people", "--json", "leave one of the two out")
    found = _chosen(port, _namespace(pid, netns_name))
    if not found:
        raise KflexError(
            "no offload is attached" + (f" to port {port}" if port else ""),
            "",
            "kflex-repro offload start --port N",
        )
    if watch:
        _watch(found)
    elif as_json:
        click.echo(json.dumps([_as_dict(s, each) for s in found], indent=2))
    else:
        console = Console(soft_wrap=True)
        for one in found:
            console.print(status.render(status.as_dict(one)))
            if each:
                wide = console if console.is_terminal else Console(width=160)
                wide.print(connections.render(connections.read(one)))


def _as_dict(one: session.Session, each: bool) -> dict[str, Any]:
    data = status.as_dict(one)
    if each:
        rows = connections.read(one)
        data["connections"] = [row.as_dict() for row in rows]
        data["connections_by_state"] = connections.summary(rows)
    return data


def _watch(found: list[session.Session]) -> None:
    """The status and the busiest connections of each server, until Ctrl-C or until all have been stopped."""
    console = Console()
    before: dict[str, dict[str, connections.Connection]] = {}
    at = time.monotonic()
    with (
        contextlib.suppress(KeyboardInterrupt),
        Live(console=console, auto_refresh=False, screen=console.is_terminal) as live,
    ):
        while found := [one for one in found if one.pin_dir.exists()]:
            now = time.monotonic()
            parts: list[RenderableType] = []
            for one in found:
                rows = connections.read(one)
                room = max(5, console.height // len(found) - 28)
                parts.append(status.render(status.as_dict(one)))
                parts.append(
                    connections.render(rows, before.get(one.server_id, {}), max(now - at, 1e-3), room)
                )
                parts.append(connections.reasons(rows))
                before[one.server_id] = {row.client: row for row in rows}
            at = now
            live.update(Group(*parts), refresh=True)
            time.sleep(1)


@group.command()
@click.option(
    "--port", type=click.IntRange(1, 65535), help="Only this server (default: all that are attached)."
)
@_where
@click.option(
    "--timeout",
    type=click.FloatRange(0.1, 3600),
    metavar="S",
    help="Seconds to wait for clients to read their replies [10].",
)
@click.option(
    "--force", is_flag=True, help="Do not wait: unread replies are lost, their clients wait for ever."
)
@click.option("--dry-run", is_flag=True, help="Say what would be taken off; change nothing.")
def stop(
    port: int | None,
    pid: int | None,
    netns_name: str | None,
    timeout: float | None,
    force: bool,
    dry_run: bool,
) -> None:
    """Take the offload off: accepted SETs go into Redis, replies are read, nothing stays attached or pinned.

    Also after the server or the toolkit was killed. Exit code 0 when there was nothing to stop.
    """
    _need_root()
    found = _chosen(port, _namespace(pid, netns_name))
    if not found:
        if not dry_run:
            places.tidy()
        click.echo("nothing is attached" + (f" to port {port}" if port else ""))
    for one in found:
        if dry_run:
            click.echo(f"would stop {one.server_id} (pid {one.pid})")
            one.close()
            continue
        with Console(stderr=True).status(f"stopping port {one.port}"):
            one.stop(timeout=timeout, force=force)
        click.echo(f"stopped: port {one.port}")


@group.command()
@click.option("--port", type=click.IntRange(1, 65535), help="Only this server (default: all).")
@click.option(
    "--export",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write them as SET commands: redis-cli --pipe < FILE applies them.",
)
@click.option("--discard", is_flag=True, help="Drop them (after the export) and take the offload off.")
@click.option("--dry-run", is_flag=True, help="Say what would be done; change nothing.")
@click.option("--json", "as_json", is_flag=True, help="As JSON: a list with one object for each dead server.")
def recover(port: int | None, path: Path | None, discard: bool, dry_run: bool, as_json: bool) -> None:
    """SETs that a killed server had acknowledged and its AOF does not hold.

    Starting the server again with the module recovers them before its first client is served. This command
    shows what is waiting, and saves or drops what cannot be recovered: the module's log line says why
    (another dataset, an older AOF, a server without the module has written since).
    """
    _need_root()
    found = [(s, s.leftovers()) for s in session.attached() if port in (None, s.port)]
    found = [(s, left) for s, left in found if left]
    if path is not None and len(found) > 1:
        raise KflexError("more than one server has left something", str(path), "say which one: --port N")
    if path is not None and found and not dry_run:
        journal.export(found[0][1], path)
    if as_json:
        click.echo(
            json.dumps(
                [
                    {
                        "server_id": s.server_id,
                        "port": s.port,
                        "pid": s.pid,
                        "sets": len(left),
                        "keys": len({each.key for each in left}),
                        "bytes": sum(len(each.key) + len(each.value) for each in left),
                        "exported": str(path) if path and not dry_run else None,
                        "discarded": discard and not dry_run,
                    }
                    for s, left in found
                ],
                indent=2,
            )
        )
    elif not found:
        click.echo("nothing is waiting to be recovered")
    for one, left in found:
        what = f"port {one.port}: up to {len(left)} SETs of {len({each.key for each in left})} keys"
        done = f", {'would be written' if dry_run else 'written'} to {path}" if path else ""
        if discard:
            done += f", {'would be dropped' if dry_run else 'dropped'}"
        if not as_json:
            click.echo(what + (done or ": start the server again with the module, or --export FILE"))
        if discard and not dry_run:
            one.stop(force=True)
        else:
            one.close()


@group.command()
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The redis.conf of the server.",
)
@click.option("--port", type=click.IntRange(1, 65535), help="Or ask the running server at this port for it.")
@_login
@click.option(
    "--prefix",
    type=click.Path(path_type=Path),
    default=installation.PREFIX,
    show_default=True,
    metavar="DIR",
    help="Where kflex.so is put: a place from which the service may execute code.",
)
@click.option("--unit", metavar="NAME", help="Its systemd service (default: the one that runs this file).")
@click.option("--revert", is_flag=True, help="Take it out again.")
@click.option("--dry-run", is_flag=True, help="Say what would be done; change nothing.")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def install(
    config: Path | None,
    port: int | None,
    user: str | None,
    askpass: bool,
    prefix: Path,
    unit: str | None,
    revert: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Have redis-server load kflex.so when it starts next (idempotent).

    Copies the module, adds a `loadmodule` line to redis.conf (the original is kept beside it), and writes a
    systemd drop-in for what the service must be allowed. The new configuration is tried with a redis-server
    that listens nowhere before it takes the place of the old one. Nothing is restarted.
    """
    if (config is None) == (port is None):
        raise click.UsageError("give --config FILE or --port N")
    if not dry_run:
        _need_root()
    service: systemd.Unit | None = None
    if port is not None:
        found = target.probe(port, login=_ask_login(user, askpass))
        config = installation.config_of(found)
        service = systemd.of_pid(found.pid)
    assert config is not None
    if unit is not None:
        service = systemd.read(unit)
    service = service or systemd.of_config(config)
    if revert:
        made = installation.revert_plan(config, service, prefix)
    else:
        made = installation.plan(config, build.ensure().module, service, prefix)
    if not dry_run:
        with Console(stderr=True).status("trying the new configuration"):
            kinds = {change.path: change.kind for change in made.changes}
            was_done = made.is_done
            installation.apply(made, verify=not revert)
    else:
        kinds = {change.path: change.kind for change in made.changes}
        was_done = made.is_done
    if as_json:
        click.echo(
            json.dumps(
                {
                    "config": str(made.target),
                    "unit": service.name if service else None,
                    "dry_run": dry_run,
                    "unchanged": was_done,
                    "changes": [
                        {"path": str(change.path), "kind": kinds[change.path], "why": change.why}
                        for change in made.changes
                    ],
                    "notes": list(made.notes),
                    "next": [] if was_done else list(made.next),
                },
                indent=2,
            )
        )
        return
    words = {"create": "written", "change": "changed", "remove": "removed"}
    for change in made.changes:
        kind = kinds[change.path]
        if kind != "keep":
            click.echo(f"{f'would {kind}' if dry_run else words[kind]}  {change.path}  ({change.why})")
    for note in made.notes:
        click.echo(f"note: {note}")
    if was_done:
        click.echo(f"nothing to do: {made.target} {'does not load' if revert else 'loads'} kflex.so")
    else:
        click.echo("then: " + "; ".join(made.next))
