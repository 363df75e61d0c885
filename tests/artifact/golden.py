"""The diffs that fitting the synthetic tree must give. `python -m tests.artifact.golden` writes them anew:

after a change of the tree or of the model, and then to be read, line by line.
"""

from __future__ import annotations

from pathlib import Path

from kflex_repro.heap import fit, model
from kflex_repro.heap.layout import layout
from kflex_repro.patching.tree import Tree

TREE = Path(__file__).parent / "tree"
SIZES = (1, 2, 4, 8)
MACHINE = model.Machine(ram_total=64 * model.GIB, ram_available=48 * model.GIB, va_bits=47, cpus=2)
# For files with a dozen heaps.
LARGE = model.Machine(ram_total=1 << 40, ram_available=1 << 40, va_bits=47, cpus=2)


def path(gb: int) -> Path:
    """Where the diff for a size is kept."""
    return Path(__file__).parent / "golden" / f"{gb}gb.diff"


def main() -> None:
    """Write all of them."""
    for gb in SIZES:
        path(gb).parent.mkdir(exist_ok=True)
        path(gb).write_text(fit.preview(Tree.open(TREE), fit.plan(TREE, layout(), gb, MACHINE)).diff)


if __name__ == "__main__":
    main()
