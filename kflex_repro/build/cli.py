"""``kflex-repro build``."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from kflex_repro.build import cache, libbpf, objects, toolchain


class _Display:
    """Progress on stderr: bars on a terminal, one line for each finished step elsewhere."""

    def __init__(self, console: Console, progress: Progress | None) -> None:
        self._console, self._progress = console, progress
        self._tasks: dict[str, TaskID] = {}
        self._lock = threading.Lock()

    def step(self, name: str, state: str, seconds: float) -> None:
        with self._lock:
            if self._progress is None:
                if state != "start":
                    self._console.print(f"{name}: {state} ({seconds:.1f} s)")
            elif state == "start":
                self._tasks[name] = self._progress.add_task(name, total=1, note="")
            else:
                self._progress.update(self._tasks[name], completed=1, note=state)

    def note(self, line: str) -> None:
        with self._lock:
            if self._progress is None:
                self._console.print(line)
            else:
                task = self._tasks.setdefault("", self._progress.add_task("libbpf", total=None, note=""))
                self._progress.update(task, note=line)


@contextlib.contextmanager
def _display() -> Iterator[_Display]:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        yield _Display(console, None)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(20),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        yield _Display(console, progress)


@click.command()
@click.option(
    "--artifact",
    is_flag=True,
    help="Build the KFlex artifact from --source DIR instead: libbpf, BPF objects, program.",
)
@click.option(
    "--kernel",
    is_flag=True,
    help="Build a kernel instead, of the distribution's source, --source DIR, or (with --artifact) KFlex's.",
)
@click.option(
    "--source",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The KFlex tree, or the kernel's; it is only read.",
)
@click.option("--distro", is_flag=True, help="The kernel of the distribution's source package (the default).")
@click.option(
    "--fragment",
    "fragments",
    multiple=True,
    metavar="NAME|PATH",
    help="A piece of the kernel's configuration, in place of the default ones: base, bpf, net, trace, vm.",
)
@click.option(
    "--host-config", is_flag=True, help="The running kernel's configuration in place of tinyconfig."
)
@click.option("--arch", metavar="NAME", help="The kernel's architecture: x86_64 or riscv64.")
@click.option("--allow-dropped", is_flag=True, help="Build the kernel also if an option did not stick.")
@click.option(
    "--recipe", "recipes", multiple=True, metavar="ID", help="Also this recipe, in the copy that is built."
)
@click.option("--no-recipe", "without", multiple=True, metavar="ID", help="Not this recipe.")
@click.option("--heap-gb", metavar="N|auto", help="Heaps of N GB (a power of two), with capacities that fit.")
@click.option("--program-only", is_flag=True, help="Without the artifact's tests and benchmarks.")
@click.option(
    "--dry-run", is_flag=True, help="With --artifact or --kernel: print checks and steps; build nothing."
)
@click.option("--force", is_flag=True, help="Build again what the cache has.")
@click.option("--only", metavar="NAME", help="Only this BPF object (or kflex.so, or vmlinux.h).")
@click.option(
    "--libbpf-from-source",
    is_flag=True,
    help="Build libbpf from the distribution's kernel source and use its headers.",
)
@click.option(
    "--libbpf-traced",
    is_flag=True,
    help="Build only the libbpf that writes what it asks of the kernel to KFLEX_TRACE (docs/trace.md).",
)
@click.option("--jobs", type=click.IntRange(1, 256), help="Compilers at a time (default: one per CPU).")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output.")
def build(
    artifact: bool,
    kernel: bool,
    source: Path | None,
    distro: bool,
    fragments: tuple[str, ...],
    host_config: bool,
    arch: str | None,
    allow_dropped: bool,
    recipes: tuple[str, ...],
    without: tuple[str, ...],
    heap_gb: str | None,
    program_only: bool,
    dry_run: bool,
    force: bool,
    only: str | None,
    libbpf_from_source: bool,
    libbpf_traced: bool,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Build the BPF objects and the Redis module into the cache; what is there and unchanged is kept.

    With --artifact: the KFlex artifact, from the user's own tree, step by step (a copy with the recipes, its
    libbpf, its BPF objects, its program). Each step is kept: a second run, or one after Ctrl-C or a failure,
    goes on where it was. What the running kernel lacks to run it is said at the end.

    With --kernel: a kernel, of fragments of configuration (kernel/) on top of tinyconfig; each option that
    was asked for and did not stick is named, with what it needs. Interrupted or killed, the build goes on
    where it was. What it prints last is the kernel for `kflex-repro vm run --kernel`.

    The cache is $KFLEX_CACHE, or kflex-repro in the user's cache directory; logs are kept in its logs/.
    """
    if kernel:
        if recipes or without or heap_gb or program_only or only or libbpf_from_source or libbpf_traced:
            raise click.UsageError("recipes, heaps, --only and the --libbpf options are not for --kernel")
        from kflex_repro.build import kernel_cli

        switches = (allow_dropped, force, dry_run, as_json)
        kernel_cli.run(
            kernel_cli.Wish(source, artifact, fragments, host_config, arch, jobs, *switches), distro
        )
        return
    if distro or fragments or host_config or arch or allow_dropped:
        raise click.UsageError("--distro, --fragment, --host-config, --arch, --allow-dropped want --kernel")
    if artifact:
        if only or libbpf_from_source or libbpf_traced:
            raise click.UsageError("--only and the --libbpf options are not for --artifact")
        from kflex_repro.build import artifact_cli

        wish = artifact_cli.Wish(
            source, recipes, without, heap_gb, not program_only, force, jobs, dry_run, as_json
        )
        with _display() as display:
            outcome = artifact_cli.make(wish, display.step)
        artifact_cli.show(outcome, wish)
        return
    if source or recipes or without or heap_gb or program_only or dry_run:
        raise click.UsageError(
            "--source, --dry-run want --artifact or --kernel; --recipe, --no-recipe, --heap-gb and"
            " --program-only want --artifact"
        )
    if libbpf_traced:
        if only or libbpf_from_source:
            raise click.UsageError("--libbpf-traced builds nothing else: no --only, no --libbpf-from-source")
        _traced(force, jobs, as_json)
        return
    started = time.monotonic()
    from_source: Path | None = None
    with _display() as display:
        if libbpf_from_source:
            from_source, _ = _make(libbpf.from_source, force, jobs, display)
        built = objects.ensure(only=only, force=force, jobs=jobs, libbpf=from_source, report=display.step)
    seconds = time.monotonic() - started
    if as_json:
        click.echo(json.dumps(_as_json(built, from_source, seconds), indent=2))
        return
    fresh_steps = sum(step.built for step in built.steps)
    click.echo(f"{fresh_steps} built, {len(built.steps) - fresh_steps} from the cache, in {seconds:.1f} s")
    for step in built.steps:
        click.echo(f"  {step.path}")


def _make(
    maker: Callable[[toolchain.Runner, bool, int | None, libbpf.Report], tuple[Path, bool]],
    force: bool,
    jobs: int | None,
    display: _Display,
) -> tuple[Path, bool]:
    """One of the builds of libbpf, with its progress; Ctrl-C ends what it runs."""
    runner = toolchain.Runner()
    before = time.monotonic()
    try:
        place, fresh = maker(runner, force, jobs, display.note)
    except BaseException:
        runner.stop()
        raise
    display.note(f"libbpf: {'built' if fresh else 'cached'} ({time.monotonic() - before:.1f} s)")
    return place, fresh


def _traced(force: bool, jobs: int | None, as_json: bool) -> None:
    started = time.monotonic()
    with _display() as display:
        place, fresh = _make(libbpf.traced, force, jobs, display)
    library = place / "lib" / "libbpf.so.1"
    if as_json:
        seconds = round(time.monotonic() - started, 3)
        result = {"cache": str(cache.root()), "seconds": seconds, "built": fresh, "library": str(library)}
        click.echo(json.dumps(result, indent=2))
        return
    click.echo(library)
    click.echo(f"  KFLEX_TRACE=/tmp/trace LD_PRELOAD={library} PROGRAM…", err=True)


def _as_json(built: objects.Built, from_source: Path | None, seconds: float) -> dict[str, object]:
    return {
        "cache": str(cache.root()),
        "seconds": round(seconds, 3),
        "libbpf": str(from_source) if from_source else None,
        "steps": [
            {
                "name": step.name,
                "path": str(step.path),
                "built": step.built,
                "seconds": round(step.seconds, 3),
                "log": str(step.log) if step.log else None,
            }
            for step in built.steps
        ],
    }
