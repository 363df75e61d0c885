"""``--host`` for a command, in one line: the same command runs there instead of here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click

_META = "kflex_repro.remote"

C = TypeVar("C", bound=click.Command)


@dataclass(frozen=True)
class Chosen:
    """The options of this room, as they were given."""

    host: str | None
    hosts: Path | None
    only: tuple[str, ...]
    identity: Path | None
    password_prompt: bool
    sudo: bool | None
    remote_command: str | None
    connect_timeout: float
    results: Path | None


def _options() -> list[click.Option]:
    file = click.Path(path_type=Path, dir_okay=False)
    return [
        click.Option(["--host"], metavar="USER@HOST[:PORT]", help="Run it there, over SSH (docs/remote.md)."),
        click.Option(
            ["--hosts"], type=file, metavar="FILE", help="Run it on all hosts of a hosts.toml at once."
        ),
        click.Option(
            ["--only"], multiple=True, metavar="NAME", help="Of --hosts: this host, or all server or test."
        ),
        click.Option(
            ["--identity"], type=file, metavar="FILE", help="SSH private key [the agent's, ~/.ssh/id_*]."
        ),
        click.Option(["--password-prompt"], is_flag=True, help="Ask for the SSH password, on the terminal."),
        click.Option(
            ["--sudo/--no-sudo"], default=None, help="There by `sudo -n` [if the user is not root]."
        ),
        click.Option(
            ["--remote-command"], metavar="COMMAND", help="The kflex-repro there, if it is not found."
        ),
        click.Option(
            ["--connect-timeout"],
            type=click.FloatRange(0.1, 600),
            default=10.0,
            show_default=True,
            metavar="S",
        ),
        click.Option(
            ["--results"],
            type=click.Path(path_type=Path, file_okay=False),
            metavar="DIR",
            help="Of --hosts: a directory for each host in it [results/<UTC time>-<command>].",
        ),
    ]


def remotely(new: Sequence[str] = (), **outputs: Callable[[], str] | None) -> Callable[[C], C]:
    """Give a click command --host and --hosts.

    ``outputs``: its parameters that name a file or directory to write, and what each is when it is not given
    (None: then nothing is written). They are written there and fetched; those in ``new`` replace no file.
    Put it above ``@click.command``.
    """

    def decorate(command: C) -> C:
        own = _options()
        before = list(command.params)
        command.params.extend(own)
        parse, invoke = command.parse_args, command.invoke

        def parse_args(ctx: click.Context, args: list[str]) -> list[str]:
            given = list(args)
            rest = parse(ctx, args)
            taken = {one.name: ctx.params.pop(str(one.name)) for one in own}
            chosen = Chosen(**taken)
            if chosen.host is not None or chosen.hosts is not None:
                ctx.meta[_META] = chosen, _raw(command, ctx, given)
            elif odd := [
                one
                for one in own
                if one.name != "connect_timeout" and taken[one.name] not in (None, (), False)
            ]:
                raise click.UsageError(f"{odd[0].opts[0]} goes with --host or --hosts", ctx)
            return rest

        def invoke_(ctx: click.Context) -> Any:
            if _META not in ctx.meta:
                return invoke(ctx)
            chosen, raw = ctx.meta[_META]
            if rest := [*ctx._protected_args, *ctx.args]:
                raise click.UsageError(f"{rest[0]} works on files of this host: without --host", ctx)
            if chosen.host is not None and chosen.hosts is not None:
                raise click.UsageError("--host or --hosts, not both", ctx)
            from kflex_repro.remote import run

            words = ctx.command_path.split()[1:]
            places = {
                name: raw.get(name) or (default() if default else None) for name, default in outputs.items()
            }
            arguments = [*words, *_arguments(before, raw, outputs)]
            wanted = run.Wanted(
                "-".join(words),
                tuple(arguments),
                {name: (_long(before, name), Path(place)) for name, place in places.items() if place},
                new=tuple(new),
                as_json=bool(raw.get("as_json")),
            )
            return ctx.exit(run.run(chosen, wanted))

        command.parse_args = parse_args  # type: ignore[method-assign]
        command.invoke = invoke_  # type: ignore[method-assign]
        return command

    return decorate


def results(command: str) -> str:
    """Where results go when no place is given."""
    return str(Path("results") / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{command}")


def _raw(command: click.Command, ctx: click.Context, args: list[str]) -> dict[str, Any]:
    """What stands on the command line, unconverted: the other side converts."""
    return dict(command.make_parser(ctx).parse_args(args=args)[0])


def _long(params: Sequence[click.Parameter], name: str) -> str:
    return max(next(one for one in params if one.name == name).opts, key=len)


def _arguments(
    params: Sequence[click.Parameter], raw: Mapping[str, Any], without: Mapping[str, object]
) -> list[str]:
    """The command line again, without this room's options and without the outputs."""
    options: list[str] = []
    arguments: list[str] = []
    for one in params:
        value = raw.get(str(one.name))
        if one.name in without or one.name not in raw:
            continue
        if isinstance(one, click.Argument):
            arguments += [str(value)] if one.nargs == 1 else [str(word) for word in value or ()]
        elif isinstance(one, click.Option) and one.is_flag:
            options.append((one.opts if value else one.secondary_opts)[0])
        elif isinstance(one, click.Option):
            options += [
                f"{_long(params, str(one.name))}={word}"
                for word in (value or () if one.multiple else [value])
            ]
    return [*options, *(["--", *arguments] if arguments else [])]
