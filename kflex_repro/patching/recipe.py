"""Recipes: what to change in a source tree, as patches/*.toml say it. Format: docs/patches.md."""

from __future__ import annotations

import string
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from kflex_repro.build.objects import source_root
from kflex_repro.errors import KflexError


@dataclass(frozen=True)
class Parameter:
    """A value the caller gives: ``integer`` (within ``least`` and ``most``) or ``string`` (one line)."""

    type: str
    help: str
    default: int | str | None = None
    least: int | None = None
    most: int | None = None


@dataclass(frozen=True)
class Step:
    """One change; docs/patches.md says which kind takes what."""

    kind: str
    file: str
    new: str = ""
    function: str = ""
    name: str = ""
    of: str = ""
    argument: int | None = None
    where: str = ""
    source: str = ""
    was: str = ""
    count: int = 1


@dataclass(frozen=True)
class Check:
    """How to see that a recipe took: ``what`` is there ``count`` times (0: no more)."""

    what: str
    file: str
    name: str
    function: str = ""
    count: int = 1


@dataclass(frozen=True)
class Recipe:
    """One job. ``target`` says what it is for; ``command`` applies it where it takes a plan of its own."""

    id: str
    version: str
    title: str
    why: str
    target: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    checks: tuple[Check, ...] = ()
    command: str = ""

    @property
    def files(self) -> tuple[str, ...]:
        """The files its steps are about."""
        return tuple(dict.fromkeys(step.file for step in self.steps))


# kind: (keys it must have, keys it may have), besides kind and file.
_KINDS: dict[str, tuple[set[str], set[str]]] = {
    "call": ({"name", "new"}, {"function", "of", "argument", "was", "count"}),
    "macro-argument": ({"name", "new", "argument"}, {"function", "was", "count"}),
    "string-literal": ({"name", "new"}, {"function", "count"}),
    "initializer": ({"name", "new"}, {"was", "count"}),
    "function": ({"name", "new", "where"}, {"count"}),
    "include": ({"new"}, {"name", "count"}),
    "text": ({"name", "new", "count"}, set()),
    "new-file": (set(), {"new", "source"}),
}
_HEAD = {"version", "title", "why", "target", "command"}
_CHECKS = {"call", "string-literal", "include", "function", "text", "file"}
_WHERE = {"before", "entry", "after"}


def directory() -> Path:
    """Where the recipes are."""
    return source_root() / "patches"


def names() -> list[str]:
    """The recipes there are."""
    return sorted(path.stem for path in directory().glob("*.toml"))


def load(name: str) -> Recipe:
    """One recipe; KflexError names the key that is wrong."""
    path = directory() / f"{name}.toml"
    if name not in names():
        raise KflexError(f"there is no recipe {name}", str(directory()), f"there are: {', '.join(names())}")
    return parse(path.read_bytes(), path)


def parse(data: bytes, path: Path) -> Recipe:
    """A recipe from its text; ``path`` is for its id and for errors."""
    try:
        table = tomllib.loads(data.decode())
    except (ValueError, UnicodeDecodeError) as error:
        raise KflexError(f"not a recipe: {error}", str(path)) from None
    if "command" in table:
        # What that command reads of it is its own.
        table = {key: value for key, value in table.items() if key in _HEAD}
    parameters = _mapping(table, "parameter", path)
    recipe = _make(
        Recipe,
        {
            **table,
            "id": path.stem,
            "parameters": {
                name: _make(Parameter, value, path, f"parameter.{name}") for name, value in parameters.items()
            },
            "steps": tuple(_step(item, path, i) for i, item in _items(table, "step", path)),
            "checks": tuple(_check(item, path, i) for i, item in _items(table, "check", path)),
        },
        path,
        "the recipe",
        also={"step", "check", "parameter"},
    )
    if bool(recipe.steps) == bool(recipe.command):
        raise _wrong(path, "a recipe has either steps or a command")
    for name, parameter in recipe.parameters.items():
        if parameter.type not in ("integer", "string"):
            raise _wrong(path, f"parameter.{name}: type is integer or string")
    return recipe


def _mapping(table: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise _wrong(path, f"{key} must be a table of tables")
    return value


def _items(table: dict[str, Any], key: str, path: Path) -> list[tuple[int, Any]]:
    value = table.get(key, [])
    if not isinstance(value, list):
        raise _wrong(path, f"{key} must be [[{key}]]")
    return list(enumerate(value, 1))


def _make(kind: type, table: Any, path: Path, where: str, also: set[str] | None = None) -> Any:
    if not isinstance(table, dict):
        raise _wrong(path, f"{where} must be a table")
    known = {item.name: item for item in fields(kind)}
    for key in table:
        if key not in known and key not in (also or set()):
            raise _wrong(path, f"{where}: unknown key {key}")
    for key, item in known.items():
        if key not in table:
            if item.default is MISSING and item.default_factory is MISSING:
                raise _wrong(path, f"{where}: {key} is missing")
        elif not _fits(str(item.type), table[key]):
            raise _wrong(path, f"{where}: {key} must be {item.type}")
    return kind(**{key: value for key, value in table.items() if key in known})


def _fits(annotation: str, value: object) -> bool:
    kinds: dict[str, type] = {"str": str, "int": int}
    wanted = [kinds[part.strip()] for part in annotation.split("|") if part.strip() in kinds]
    return not wanted or (isinstance(value, tuple(wanted)) and not isinstance(value, bool))


def _step(table: Any, path: Path, number: int) -> Step:
    where = f"step {number}"
    step: Step = _make(Step, table, path, where)
    if step.kind not in _KINDS:
        raise _wrong(path, f"{where}: unknown kind {step.kind}, there are {', '.join(_KINDS)}")
    must, may = _KINDS[step.kind]
    given = set(table) - {"kind", "file"}
    if lacking := sorted(must - given):
        raise _wrong(path, f"{where}: {step.kind} needs {lacking[0]}")
    if odd := sorted(given - must - may):
        raise _wrong(path, f"{where}: {step.kind} has no {odd[0]}")
    if step.kind == "new-file" and bool(step.new) == bool(step.source):
        raise _wrong(path, f"{where}: new-file needs either new or source")
    if step.where and step.where not in _WHERE:
        raise _wrong(path, f"{where}: where is one of {', '.join(sorted(_WHERE))}")
    if step.count < 1 or (step.argument or 0) < 0:
        raise _wrong(path, f"{where}: count is 1 or more, argument 0 or more")
    _inside(step.file, path, where)
    if step.source:
        _inside(step.source, path, where)
    return step


def _check(table: Any, path: Path, number: int) -> Check:
    where = f"check {number}"
    check: Check = _make(Check, {"name": "", **table} if isinstance(table, dict) else table, path, where)
    if check.what not in _CHECKS:
        raise _wrong(path, f"{where}: what is one of {', '.join(sorted(_CHECKS))}")
    if not check.name and check.what != "file":
        raise _wrong(path, f"{where}: name is missing")
    _inside(check.file, path, where)
    return check


def _inside(name: str, path: Path, where: str) -> None:
    if not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise _wrong(path, f"{where}: {name or 'file'} is no path inside the tree")


def _wrong(path: Path, what: str) -> KflexError:
    return KflexError(f"not a recipe: {what}", str(path), "docs/patches.md has the format")


def values(recipe: Recipe, given: Mapping[str, object]) -> dict[str, str]:
    """The parameters as text, checked, with their defaults."""
    if unknown := sorted(set(given) - set(recipe.parameters)):
        known = ", ".join(recipe.parameters) or "none"
        raise KflexError(f"{recipe.id} has no parameter {unknown[0]}", "", f"it has: {known}")
    found = {}
    for name, parameter in recipe.parameters.items():
        value = given.get(name, parameter.default)
        if value is None:
            raise KflexError(f"{recipe.id} needs {name}", parameter.help, f"--set {name}=…")
        found[name] = _value(f"{name}={value}", value, parameter)
    return found


def _value(shown: str, value: object, parameter: Parameter) -> str:
    if parameter.type == "string":
        text = str(value)
        # It goes into a C string or a name: nothing that could end either.
        if not text.isprintable() or any(mark in text for mark in "\"\\'`$"):
            raise KflexError("not a plain string", shown, parameter.help)
        return text
    try:
        number = int(str(value), 10)
    except ValueError:
        raise KflexError("not a whole number", shown, parameter.help) from None
    if (parameter.least is not None and number < parameter.least) or (
        parameter.most is not None and number > parameter.most
    ):
        raise KflexError(f"not within {parameter.least} and {parameter.most}", shown, parameter.help)
    return str(number)


def fill(template: str, known: Mapping[str, str], where: str) -> str:
    """The template's ``$name`` replaced; KflexError for one that is not known."""
    try:
        return string.Template(template).substitute(known)
    except KeyError as error:
        raise KflexError(f"${error.args[0]} is not known here", where, f"known: {', '.join(known)}") from None
    except ValueError as error:
        raise KflexError(f"a lone $: {error}", where, "write $$") from None
