"""``python -m tests.vm``: the smoke tests in a VM on every kernel at hand, and what each kernel can do."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from kflex_repro.errors import KflexError
from tests.vm import smoke, table


def _kernels(given: tuple[str, ...]) -> tuple[str, ...]:
    """What was asked for; else the distribution's series and, of those built here, the newest."""
    from kflex_repro.vm import kernels

    if given:
        return given
    at_hand = kernels.at_hand()
    built = [spec for spec in at_hand if "/" in spec]
    return (*(spec for spec in at_hand if "/" not in spec), *built[-1:])


def _one(
    spec: str,
    out: Path,
    accel: str,
    timeout: float | None,
    everything: bool,
    verbose: bool,
    report: Console,
) -> smoke.Smoke:
    def show(data: bytes) -> None:
        sys.stderr.buffer.write(data)
        sys.stderr.buffer.flush()

    report.print(f"{spec} …", style="bold")
    try:
        found = smoke.run(
            spec,
            out,
            accel=accel,
            timeout=timeout,
            everything=everything,
            stdout=show if verbose else lambda _data: None,
            note=lambda line: report.print(f"  {line}", markup=False),
        )
    except KflexError as error:
        found = smoke.Smoke(spec, failure=str(error))
    for problem in found.problems:
        report.print(f"{spec}: {problem}", markup=False, style="red")
    if not found.problems:
        report.print(f"  {found.summary}")
    return found


@click.command()
@click.argument("kernels", nargs=-1)
@click.option(
    "--accel", type=click.Choice(["auto", "kvm", "tcg"]), default="auto", show_default=True, help="Of QEMU."
)
@click.option(
    "--timeout",
    type=click.FloatRange(10, 86400),
    help=f"Seconds for each kernel [{smoke.TIMEOUT:.0f}; with --all {smoke.TIMEOUT_ALL:.0f}].",
)
@click.option("--all", "everything", is_flag=True, help="Also the tests marked emulated: nine times as many.")
@click.option(
    "--write",
    "document",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Replace the table in this document, between its two markers.",
)
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Keep each kernel's results here."
)
@click.option("--markdown", "as_markdown", is_flag=True, help="The table as docs/kernels.md has it.")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON on standard output.")
@click.option("-v", "--verbose", is_flag=True, help="What the tests print, as they run.")
def main(
    kernels: tuple[str, ...],
    accel: str,
    timeout: float | None,
    everything: bool,
    document: Path | None,
    out: Path | None,
    as_markdown: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    """Run the smoke tests in a VM on each of KERNELS: series (6.1), images, packages, directories.

    Default: all series of the distribution, and the newest kernel that `kflex-repro build --kernel` made.
    Exit code 1 if a kernel did not boot or a test did not pass; the others have their turn all the same.
    """
    report = Console(stderr=True, highlight=False, soft_wrap=True)
    specs = _kernels(kernels)
    if document is not None:
        table.between(document.read_text())
    runs = []
    with tempfile.TemporaryDirectory(prefix="kflex-vm-") as scratch:
        for number, spec in enumerate(specs):
            place = (out or Path(scratch)) / f"{number}-{spec.replace('/', '_')}"
            place.mkdir(parents=True, exist_ok=True)
            runs.append(_one(spec, place, accel, timeout, everything, verbose, report))
    if as_json:
        click.echo(json.dumps([one.to_json() for one in runs], indent=2))
    elif as_markdown:
        click.echo(table.markdown(runs), nl=False)
    else:
        head, *body = table.rows(runs)
        shown = Table(*head)
        for row in body:
            shown.add_row(*(cell.strip("*") for cell in row))
        Console(highlight=False).print(shown)
    if document is not None:
        table.write(document, runs)
    if failed := [one.kernel for one in runs if one.problems]:
        report.print(f"not all is well on: {', '.join(failed)}")
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except KflexError as error:
        click.echo(f"test-vm: {error}", err=True)
        sys.exit(error.exit_code)
