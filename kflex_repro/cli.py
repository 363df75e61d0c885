"""The command line: click groups only. Parse, call, print; the work is elsewhere.

Groups of other rooms are imported when they are asked for: ``doctor`` does not wait for the plotting library.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import click

from kflex_repro import __version__
from kflex_repro.errors import KflexError

_LAZY = {
    "bench": (
        "kflex_repro.bench.cli:group",
        "Benchmarks: the offload against plain Redis; what probes cost.",
    ),
    "build": (
        "kflex_repro.build.cli:build",
        "Build the BPF objects and the Redis module, or the KFlex artifact.",
    ),
    "diagnose": (
        "kflex_repro.diagnose.cli:diagnose",
        "Why the KFlex artifact fails, and what to do about it.",
    ),
    "doctor": ("kflex_repro.host_cli:doctor", "What this machine can do, and what is missing."),
    "fit-heap": ("kflex_repro.heap.fit_cli:fit_heap", "Fit a KFlex tree's heaps and capacities to a size."),
    "heap": ("kflex_repro.heap.cli:group", "The artifact's heap: why it can be mapped, or not."),
    "kernel": (
        "kflex_repro.kernel.cli:group",
        "Install a kernel beside the distribution's, boot it once, remove it.",
    ),
    "monitor": ("kflex_repro.probe.cli:group", "Live latencies of each command of running redis-servers."),
    "offload": ("kflex_repro.offload.cli:group", "Serve GET and SET of a redis-server in the kernel."),
    "patch": ("kflex_repro.patching.cli:group", "Recipes that make a KFlex source tree run here."),
    "profile": ("kflex_repro.probe.profile_cli:command", "Where a process spends its time: flame graphs."),
    "run": (
        "kflex_repro.run.cli:run",
        "Run the KFlex artifact, where the kernel can; say what its modes serve.",
    ),
    "vm": ("kflex_repro.vm.cli:group", "Run a command, or a shell, as root in a small virtual machine."),
    "trace": ("kflex_repro.probe.trace_cli:group", "Count system calls and function calls of a process."),
}

# Not for people: what --host starts on the other side.
_HIDDEN = {"remote-agent": "kflex_repro.remote.agent:command"}


class LazyGroup(click.Group):
    """A click group whose subcommands are imported on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_LAZY)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        place = _LAZY[cmd_name][0] if cmd_name in _LAZY else _HIDDEN.get(cmd_name)
        if place is None:
            return None
        module, _, attribute = place.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _LAZY[name][1]) for name in sorted(_LAZY)])


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="kflex-repro")
def cli() -> None:
    """Redis GET and SET answered inside the kernel, coherently, beside an unmodified redis-server; the KFlex
    artifact made to fit, or told why it does not; and a look at what a Redis does.

    Start with `kflex-repro doctor`. KFLEX_DEBUG=1 shows tracebacks.
    """
    from kflex_repro.build import libbpf

    libbpf.activate()


def _terminate(signum: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)


def _say(line: str) -> None:
    print(f"kflex-repro: {line}", file=sys.stderr)


def _os_error_line(error: OSError) -> str:
    text = error.strerror or str(error)
    if error.filename:
        text += f": {error.filename}"
    if error.errno == errno.ENOSPC:
        text += " (free some space, or choose another place with --out or KFLEX_CACHE)"
    return text


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code; every failure of the user's is one line on stderr."""
    # A terminated run must unwind like an interrupted one: context managers take hooks and servers down.
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _terminate)
    try:
        result = cli.main(args=argv, prog_name="kflex-repro", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        _say("interrupted")
        return 130
    except KflexError as error:
        if os.environ.get("KFLEX_DEBUG"):
            raise
        _say(str(error))
        return error.exit_code
    except BrokenPipeError:
        # The reader went away (`| head`): say nothing more, also not at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if os.environ.get("KFLEX_DEBUG"):
            raise
        _say(_os_error_line(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
