"""Why a kernel option is not what was asked for: its dependencies, read by kconfiglib, with their values.

The values are those of the finished configuration, made by the kernel's own Kconfig: kconfiglib only reads.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kconfiglib

from kflex_repro.build.kernel_config import Dropped
from kflex_repro.build.kernel_source import Arch
from kflex_repro.errors import KflexError

_LEVELS = {"n": 0, "m": 1, "y": 2}
# Selectors that are shown of the many that an option can have.
_SHOWN = 3


class _Reader(kconfiglib.Kconfig):
    """kconfiglib (2020) with what Linux 6.x spells otherwise: ``modules`` was ``option modules``."""

    def _open(self, filename: str, mode: str) -> Any:
        if mode == "r" and "Kconfig" in Path(filename).name:
            text = Path(filename).read_text(encoding="utf-8")
            return io.StringIO(re.sub(r"(?m)^(\s+)modules$", r"\1option modules", text))
        return super()._open(filename, mode)


@contextmanager
def _environment(root: Path, version: str, arch: Arch) -> Iterator[None]:
    """What the tree's Kconfig files expect of make."""
    values = {
        "srctree": str(root),
        "ARCH": arch.source,
        "SRCARCH": arch.source,
        "KERNELVERSION": version,
        "CC": f"{arch.cross}gcc",
        "LD": f"{arch.cross}ld",
        "AR": f"{arch.cross}ar",
        "NM": f"{arch.cross}nm",
        "OBJCOPY": f"{arch.cross}objcopy",
        "HOSTCC": "gcc",
        "HOSTCXX": "g++",
        "PAHOLE": "pahole",
        "RUSTC": "rustc",
        "BINDGEN": "bindgen",
        "CLANG_FLAGS": "",
    }
    old = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def explain(
    root: Path, version: str, arch: Arch, values: Mapping[str, str], dropped: tuple[Dropped, ...]
) -> dict[str, str]:
    """The reason for each, by name. A tree that kconfiglib cannot read is said so as the reason."""
    try:
        with _environment(root, version, arch):
            kconfig = _Reader("Kconfig", warn_to_stderr=False)
    except (kconfiglib.KconfigError, OSError, UnicodeDecodeError, subprocess.SubprocessError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return {one.asked.name: f"its dependencies cannot be read ({first})" for one in dropped}
    if not kconfig.unique_defined_syms:
        raise KflexError("the tree's Kconfig defines no option", str(root), "is it a kernel tree?")
    return {one.asked.name: _Options(kconfig, values).why(one) for one in dropped}


class _Options:
    """The tree's options with the values of one configuration."""

    def __init__(self, kconfig: Any, values: Mapping[str, str]) -> None:
        self._kconfig, self._values = kconfig, values

    def why(self, dropped: Dropped) -> str:
        name, wanted = dropped.asked.name, dropped.asked.value
        symbol = self._kconfig.syms.get(name)
        if symbol is None or not symbol.nodes:
            return "this kernel has no such option"
        if _LEVELS.get(wanted, 2) < _LEVELS.get(dropped.value, 0):
            return self._held(symbol)
        if unmet := self._unmet(symbol.direct_dep, _LEVELS.get(wanted, 2)):
            return f"it needs {unmet}"
        prompts = [node.prompt[1] for node in symbol.nodes if node.prompt]
        if not prompts:
            selectors = self._selectors(symbol, active=False)
            return f"nothing but another option sets it{f': {selectors}' if selectors else ''}"
        if self._level(prompts[0]) == 0 and len(prompts) == 1:
            return f"it can be set only with {self._unmet(prompts[0], 2)}"
        if symbol.choice is not None:
            taken = [one.name for one in symbol.choice.syms if self._values.get(one.name) == "y"]
            if taken:
                return f"of its choice, {taken[0]} was taken"
        return self._ranged(symbol)

    def _held(self, symbol: Any) -> str:
        if selectors := self._selectors(symbol, active=True):
            return f"{selectors} selects it"
        if not any(node.prompt and self._level(node.prompt[1]) for node in symbol.nodes):
            return "it cannot be switched off here"
        return "it is on by default and cannot be switched off here"

    def _ranged(self, symbol: Any) -> str:
        for low, high, condition in symbol.ranges:
            if self._level(condition):
                return f"its range is {self._value(low)} to {self._value(high)}"
        return "Kconfig took another value"

    def _selectors(self, symbol: Any, active: bool) -> str:
        terms = kconfiglib.split_expr(symbol.rev_dep, kconfiglib.OR)
        found = []
        for term in terms:
            first = kconfiglib.split_expr(term, kconfiglib.AND)[0]
            if not isinstance(first, kconfiglib.Symbol) or first.is_constant:
                continue
            if not active or self._level(term):
                found.append(first.name)
        more = f" or {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        return " or ".join(found[:_SHOWN]) + more

    def _unmet(self, expression: Any, wanted: int) -> str:
        """The parts of a condition that keep it below ``wanted``, with what their options are."""
        parts = kconfiglib.split_expr(expression, kconfiglib.AND)
        unmet = [part for part in parts if self._level(part) < wanted]
        return ", and ".join(self._shown(part) for part in unmet)

    def _shown(self, expression: Any) -> str:
        text = kconfiglib.expr_str(expression)
        symbols = {
            item.name: item
            for item in kconfiglib.expr_items(expression)
            if isinstance(item, kconfiglib.Symbol)
        }
        states = [
            f"{name} is {self._value(symbol)}"
            for name, symbol in sorted(symbols.items())
            if not symbol.is_constant and not re.fullmatch(r"\d+", name)
        ]
        unknown = [name for name, symbol in symbols.items() if not symbol.nodes and not symbol.is_constant]
        states = [state for state in states if state.split()[0] not in unknown]
        return f"{text} ({', '.join(states[:4])})" if states else text

    def _value(self, symbol: Any) -> str:
        if symbol.is_constant or not symbol.nodes:
            return str(symbol.name)
        return self._values.get(symbol.name, "n").strip('"')

    def _level(self, expression: Any) -> int:
        """A condition's value: 0 for n, 1 for m, 2 for y."""
        if isinstance(expression, tuple):
            kind, *sides = expression
            if kind == kconfiglib.AND:
                return min(self._level(side) for side in sides)
            if kind == kconfiglib.OR:
                return max(self._level(side) for side in sides)
            if kind == kconfiglib.NOT:
                return 2 - self._level(sides[0])
            return 2 if self._compared(kind, *sides) else 0
        if isinstance(expression, kconfiglib.Choice):
            return 2 if any(self._values.get(one.name) == "y" for one in expression.syms) else 0
        return _LEVELS.get(self._value(expression), 0)

    def _compared(self, kind: int, left: Any, right: Any) -> bool:
        one, other = self._value(left), self._value(right)
        try:
            difference = int(one, 0) - int(other, 0)
        except ValueError:
            difference = (one > other) - (one < other)
        return {
            kconfiglib.EQUAL: difference == 0,
            kconfiglib.UNEQUAL: difference != 0,
            kconfiglib.LESS: difference < 0,
            kconfiglib.LESS_EQUAL: difference <= 0,
            kconfiglib.GREATER: difference > 0,
            kconfiglib.GREATER_EQUAL: difference >= 0,
        }[kind]
