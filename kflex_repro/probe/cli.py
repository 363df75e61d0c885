"""``kflex-repro monitor``."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.live import Live

from kflex_repro.errors import KflexError, Unavailable
from kflex_repro.probe import events as events_
from kflex_repro.probe import latency, monitor, targets
from kflex_repro.probe.events import Event
from kflex_repro.probe.monitor import Interval, KeyPattern, Watch
from kflex_repro.probe.record import Recording, Writer
from kflex_repro.remote.options import remotely

_UNITS = {"ns": 1, "us": 1_000, "µs": 1_000, "ms": 1_000_000, "s": 1_000_000_000}

F = TypeVar("F", bound=Callable[..., object])


class Duration(click.ParamType[int]):
    """``1ms``, ``250us``, ``2s`` as nanoseconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s)", str(value))
        if match is None:
            self.fail(f"{value!r} is no duration: 250us, 1ms, 2s", param, ctx)
        return round(float(match[1]) * _UNITS[match[2]])


class Share(click.ParamType[int]):
    """``1/100`` as 100."""

    name = "1/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"1/(\d{1,9})", str(value))
        if match is None or int(match[1]) < 1:
            self.fail(f"{value!r} is no share: 1/100", param, ctx)
        return int(match[1])


def _filters(command: F) -> F:
    for option in (
        click.option(
            "--slower-than",
            type=Duration(),
            default=0,
            metavar="TIME",
            help="Events: only requests that took this long: 250us, 1ms, 2s.",
        ),
        click.option(
            "--key", metavar="GLOB", help="Only requests whose first argument is such a key: user:*"
        ),
        click.option("--command", "commands", multiple=True, metavar="NAME", help="Only this (repeatable)."),
    ):
        command = option(command)
    return command


@remotely(new=["record"], record=None)
@click.group("monitor", invoke_without_command=True)
@click.option(
    "--port", "ports", type=click.IntRange(1, 65535), multiple=True, help="A server's port (repeatable)."
)
@click.option(
    "--pid", "pids", type=click.IntRange(1), multiple=True, help="A server's process, also in a container."
)
@click.option("--events", "with_events", is_flag=True, help="Each request as it is answered.")
@_filters
@click.option(
    "--sample",
    type=Share(),
    default=1,
    metavar="1/N",
    help="Look at about one request of N: cheaper, rates are estimates then.",
)
@click.option(
    "--redact/--no-redact",
    default=True,
    show_default=True,
    help="Keep values out: names, keys, sizes, status replies only.",
)
@click.option(
    "--record", type=click.Path(path_type=Path), metavar="FILE", help="Events into a file, to `replay`."
)
@click.option("--json", "as_json", is_flag=True, help="A line of JSON for each interval or event.")
@click.option(
    "--interval", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True, metavar="SECONDS"
)
@click.option("--duration", type=click.FloatRange(0.1), metavar="SECONDS", help="End by itself.")
@click.option(
    "--probe",
    type=click.Choice(["auto", "sock", "syscalls"]),
    default="auto",
    show_default=True,
    help="sock: socket tracepoints (Linux 6.3), cheapest; syscalls: all system calls, knows when one begins.",
)
@click.pass_context
def group(
    ctx: click.Context,
    ports: tuple[int, ...],
    pids: tuple[int, ...],
    with_events: bool,
    commands: tuple[str, ...],
    key: str | None,
    slower_than: int,
    sample: int,
    redact: bool,
    record: Path | None,
    as_json: bool,
    interval: float,
    duration: float | None,
    probe: str,
) -> None:
    """What each command takes inside running redis-servers: rates, latencies, errors, bytes.

    Without --port and --pid: every redis-server of this host. Nothing is asked of the servers, nothing
    changes in them; Ctrl-C takes everything off and shows the whole.

    Latency is from the arrival of a request's bytes in the server's socket to the end of the write of its
    reply: queue (until the server has read it), exec (until the server's next read or write), reply (the
    turns of others, and the write). docs/monitor.md says how exact that is.

    \b
      kflex-repro monitor --port 6379
      kflex-repro monitor --events --command GET --key 'user:*' --slower-than 1ms
      kflex-repro monitor --record busy.kmon --duration 10; kflex-repro monitor replay busy.kmon
    """
    if ctx.invoked_subcommand is not None:
        return
    if os.geteuid() != 0:
        raise Unavailable("the monitor needs root", "kflex-repro monitor", "run it with sudo")
    pattern = monitor.key_pattern(key) if key is not None else None
    each = with_events or record is not None
    if pattern is not None and not pattern.simple and not each:
        raise KflexError(
            f"the kernel cannot count by the pattern {key!r}",
            "--key",
            "a key or a prefix with a * at its end, or add --events",
        )
    if not each and slower_than:
        raise KflexError("--slower-than chooses events", "monitor", "add --events or --record FILE")
    servers = targets.choose(ports, pids)
    options = latency.Options(
        events=each,
        redact=redact,
        commands=tuple(name.upper() for name in commands),
        key_prefix=pattern.prefix if pattern else b"",
        key_whole=pattern.whole if pattern else False,
        slower_than=slower_than,
        sample=sample,
        probe=probe,
    )
    with _opened(servers, options, until_pids=bool(pids) and not ports) as watch:
        show = _Show(watch, pattern, as_json, with_events, record)
        try:
            with _until_interrupted(watch):
                monitor.run(watch, interval, duration, show.records, show.interval)
        finally:
            show.close()
        show.summary()


@contextlib.contextmanager
def _until_interrupted(watch: Watch) -> Iterator[None]:
    """Ctrl-C is how it is meant to end: after the line that is being written. A second one does not wait."""

    def end(signum: int, frame: FrameType | None) -> None:
        watch.ended = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _opened(servers: list[targets.Server], options: latency.Options, until_pids: bool) -> Watch:
    def say(line: str) -> None:
        click.echo(f"kflex-repro: {line}", err=True)

    status = Console(stderr=True, quiet=not sys.stderr.isatty()).status("attaching")
    with status:
        probe = latency.Probe(servers, options)
    try:
        return Watch(probe, until_pids, say)
    except BaseException:
        probe.close()
        raise


class _Show:
    """Where what is seen goes: the terminal, lines of text or JSON, a file."""

    def __init__(
        self, watch: Watch, pattern: KeyPattern | None, as_json: bool, with_events: bool, record: Path | None
    ) -> None:
        self._watch, self._pattern = watch, pattern
        self._json, self._events = as_json, with_events
        self._writer: Writer | None = monitor.recorder(watch, record) if record is not None else None
        self._commands = watch.probe.options.commands
        self._live: Live | None = None
        if not as_json and not with_events and sys.stdout.isatty():
            self._live = Live(console=Console(), screen=False, auto_refresh=False, transient=True)
            self._live.start()

    def records(self, records: list[bytes]) -> None:
        reader = self._watch.reader
        if self._writer is not None:
            self._writer.add(records, reader.names)
        if not self._events:
            return
        labels = [f":{server.port} " for server in self._watch.probe.servers]
        if len(labels) == 1:
            labels = [""]
        lines = []
        for event in map(reader.decode, records):
            if monitor.wanted(event, self._commands, self._pattern, 0):
                lines.append(_line(event, labels[event.server], self._json))
        if lines:
            click.echo("\n".join(lines))

    def interval(self, made: Interval) -> None:
        if self._json and not self._events:
            click.echo(json.dumps(monitor.as_dict(made, "interval")))
        elif self._live is not None:
            width = self._live.console.width
            self._live.update(monitor.table(made, self._title(made), width), refresh=True)

    def _title(self, made: Interval) -> str:
        servers = ", ".join(server.label for server in self._watch.probe.servers)
        return f"{servers}: the last {made.seconds:.1f} s (Ctrl-C ends)"

    def summary(self) -> None:
        made = self._watch.all()
        if self._json:
            click.echo(json.dumps(monitor.as_dict(made, "summary")))
            return
        # Below the events it would be in the way of whoever reads them from a pipe.
        console = _console(stderr=self._events)
        servers = ", ".join(server.label for server in self._watch.probe.servers)
        shown = monitor.table(made, f"{servers}: {made.seconds:.1f} s in all", console.width)
        console.print(shown, highlight=False)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
        if self._writer is not None:
            self._writer.close(monitor.as_dict(self._watch.all(), "summary"))


def _console(stderr: bool = False) -> Console:
    """A terminal as wide as it is; a file or pipe as wide as the table."""
    made = Console(stderr=stderr)
    return made if made.is_terminal else Console(stderr=stderr, width=160)


def _line(event: Event, label: str, as_json: bool) -> str:
    if as_json:
        return json.dumps(events_.as_dict(event))
    return label + events_.line(event)


@group.command()
@click.argument("file", type=click.Path(path_type=Path))
@_filters
@click.option("--events/--table", "with_events", default=True, show_default=True, help="Lines, or a table.")
@click.option("--json", "as_json", is_flag=True, help="A line of JSON for each event.")
def replay(
    file: Path, commands: tuple[str, ...], key: str | None, slower_than: int, with_events: bool, as_json: bool
) -> None:
    """Show a recording as `monitor` would have. Filters apply anew."""
    pattern = monitor.key_pattern(key) if key is not None else None
    names = [name.upper() for name in commands]
    with Recording(file) as recording:
        labels = (
            [f":{server['port']} " for server in recording.servers] if len(recording.servers) > 1 else [""]
        )
        chosen = (one for one in recording.events() if monitor.wanted(one, names, pattern, slower_than))
        if with_events or as_json:
            for event in chosen:
                click.echo(_line(event, labels[event.server], as_json))
        else:
            made = monitor.of_events(chosen)
            console = _console()
            title = f"{file.name}: {made.seconds:.1f} s"
            console.print(monitor.table(made, title, console.width), highlight=False)
        if recording.cut_off:
            click.echo("kflex-repro: the recording was cut off: this is what there is", err=True)
        elif dropped := recording.totals.get("dropped"):
            click.echo(f"kflex-repro: {dropped:,} events were dropped while recording", err=True)
