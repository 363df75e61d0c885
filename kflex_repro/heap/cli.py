"""``kflex-repro heap``: why a heap of the artifact can be mapped, or not."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from kflex_repro import memory
from kflex_repro.heap import explain as words
from kflex_repro.heap import model, picture, search


@click.group()
def group() -> None:
    """The artifact's heap: how large it can be, and where it can go."""


@group.command()
@click.option("--gb", required=True, metavar="N", help="The heap's size in GB: a power of two, 1 to 8192.")
@click.option(
    "--va-bits",
    metavar="BITS|NAME",
    help="Another address space than this machine's, on paper: its bits of user space, or "
    f"{', '.join(known.name for known in search.PLATFORMS)}. A number that two of them have (47, 56) means "
    "x86-64's; riscv64's sv39, sv48 and sv57 leave user space 38, 47 and 56.",
)
@click.option(
    "--search",
    "which",
    type=click.Choice(["old", "fixed", "both"]),
    default="both",
    show_default=True,
    help="The artifact's search, the one from the real end of user space, or both.",
)
@click.option("--json", "as_json", is_flag=True, help="The explanation as JSON.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Draw the picture into a .png or .svg file, too.",
)
def explain(gb: str, va_bits: str | None, which: str, as_json: bool, plot: Path | None) -> None:
    """Why mmap of a heap fails with ENOMEM, or at which try it succeeds.

    Shows the addresses that the artifact's libbpf tries (from 2^48 down, the heap's size apart, 1,024 at
    most) and where user space ends, and the same for a search that starts at that end. On this machine the
    tries are made for real: mmaps of a memfd with the artifact's flags. They take addresses, no memory, and
    need no root.

    Exit code 0 also when a search fails: that is the answer.
    """
    size = model.parse_gb(gb)
    where = search.platform(va_bits) if va_bits is not None else None
    made = words.explain(size, where, ("old", "fixed") if which == "both" else (which,))
    if plot is not None:
        picture.save(made, plot)
    if as_json:
        click.echo(json.dumps(words.as_json(made), indent=2))
        return
    _print(made)
    if plot is not None:
        click.echo(f"\nDrawn: {plot}")


def _print(made: words.Explanation) -> None:
    # Piped, the picture has one width: it is read in logs and issues.
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    heap = model.Heap("heap", made.gb)
    console.print(
        Text(f"A heap of {made.gb} GB in {made.platform.text}: user space ends at ")
        + Text(f"{words.place(made.platform.task_size)} ({made.platform.task_size:#x})", "bold")
    )
    console.print()
    for line in picture.terminal(made, console.width, unicode):
        console.print(line, overflow="crop", no_wrap=True)
    for case in made.cases:
        ok = case.outcome.address is not None
        how = "real mmaps" if case.real else "on paper"
        console.print()
        console.print(Text(f"{case.name}: {case.title}, {how}", "bold"))
        for row in picture.listed(case):
            console.print(Text(row if unicode else row.replace("…", "...")), overflow="crop", no_wrap=True)
        console.print(Text(words.verdict(case), "green" if ok else "bold red"))
        works = words.works_for(made.platform, case.name)
        console.print(Text(f"Of 1 to 512 GB it finds a place for: {_list(works)}."))
        if case.real and case.paper != case.outcome:
            console.print(Text("Paper says otherwise: something here keeps mmap from working.", "bold red"))
            console.print(Text(f"On paper: {words.verdict(replace(case, outcome=case.paper))}"))
    objects = words.capacities(made)
    free = made.machine.ram_available
    fits = memory.misfit("", heap.ram_bytes, free) is None
    console.print()
    console.print(Text("Besides", "bold"))
    console.print(
        f"Making the map takes {memory.amount(heap.ram_bytes)} of RAM at once ({heap.pages:,} pages); "
        f"free here: {memory.amount(free)}"
        + ("." if fits else ", so it fails with ENOMEM before any search.")
    )
    console.print(
        f"On {objects.cpus} CPUs it holds {objects.planned:,} objects of each size class, if the program has "
        f"MALLOC_CONF=retain:false in its environment ({objects.retained:,} to {objects.once:,} without: "
        f"docs/heap.md); the artifact asks for {words.ARTIFACT_OBJECTS:,}."
    )


def _list(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes)) + " GB" if sizes else "none"
