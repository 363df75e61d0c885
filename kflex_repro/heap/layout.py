"""What KFlex's heaps look like, as ``patches/heap-size.toml`` says it."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from typing import Any

from kflex_repro.build.objects import source_root
from kflex_repro.errors import KflexError
from kflex_repro.heap.capacities import CapacityShape
from kflex_repro.heap.declarations import Shape

RECIPE = "heap-size"


@dataclass(frozen=True)
class Layout:
    """How to find a tree's heaps, and the capacities that fill them."""

    heaps: Shape
    capacities: tuple[CapacityShape, ...] = ()
    version: str = "1"


@functools.cache
def layout() -> Layout:
    """The layout in the recipe. KflexError where the recipe is not there or says something unknown."""
    path = source_root() / "patches" / f"{RECIPE}.toml"
    try:
        recipe = tomllib.loads(path.read_text())
        table = recipe["fit"]
        capacities = tuple(CapacityShape(**_frozen(item)) for item in table.pop("capacity", []))
        return Layout(Shape(**_frozen(table)), capacities, recipe["version"])
    except OSError as error:
        raise KflexError(f"cannot read the recipe: {error.strerror}", str(path)) from None
    except (ValueError, KeyError, TypeError) as error:
        raise KflexError(f"[fit] is damaged: {error}", str(path), "restore it from the checkout") from None


def _frozen(table: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
