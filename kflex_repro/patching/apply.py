"""A recipe over a tree: planned, checked in memory, made, and its state told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from kflex_repro.errors import KflexError
from kflex_repro.patching import recipe as recipes
from kflex_repro.patching.anchor import Call, Function, Source, one_line
from kflex_repro.patching.clang import Span
from kflex_repro.patching.recipe import Check, Recipe, Step
from kflex_repro.patching.tree import Edit, Tree


@dataclass(frozen=True)
class Plan:
    """What applying a recipe would do: the edits, and the unified diff from the tree as it is."""

    recipe: Recipe
    parameters: Mapping[str, str]
    edits: tuple[Edit, ...]
    diff: str

    @property
    def files(self) -> tuple[str, ...]:
        """The files it changes."""
        return tuple(dict.fromkeys(edit.path for edit in self.edits))


@dataclass(frozen=True)
class Status:
    """Where a recipe stands in a tree; ``detail`` says why.

    ``state``: applied, edited (by hand since), outdated (applied in another version), present (in the tree,
    but not from us), applicable, not applicable.
    """

    id: str
    title: str
    state: str
    detail: str = ""
    version: str = ""
    when: str = ""
    files: tuple[str, ...] = ()

    def as_json(self) -> dict[str, object]:
        """For ``--json``."""
        return {**asdict(self), "files": list(self.files)}


def plan(recipe: Recipe, tree: Tree, given: Mapping[str, object] | None = None) -> Plan:
    """Find every anchor and plan the edits; nothing is written.

    KflexError naming step, file and what was looked for where an anchor is missing or there too often, and
    where the result would not pass the recipe's own checks.
    """
    if recipe.command:
        raise KflexError(
            f"{recipe.id} takes a plan of its own", recipe.title, f"kflex-repro {recipe.command} applies it"
        )
    known = recipes.values(recipe, given or {})
    applied = tree.get(recipe.id)
    mine = recipe.id if applied else ""
    if applied and _stands(recipe, known, tree):
        # Planned anew it could come out in another order beside the recipes applied since.
        return Plan(recipe, known, (), "")
    sources: dict[str, Source] = {}
    edits: list[Edit] = []
    for number, step in enumerate(recipe.steps, 1):
        where = f"{recipe.id}, step {number}"
        if step.kind == "new-file":
            edits.append(_new_file(step, known, where))
            continue
        if step.file not in sources:
            if not tree.exists(step.file, mine):
                raise KflexError(f"{where}: no file {step.file}", str(tree.root), "is this the right tree?")
            sources[step.file] = Source(tree.root, step.file, tree.read(step.file, mine))
        edits += _edits(step, sources[step.file], known, where)
    diff = tree.diff(edits, mine)
    after = tree.planned(edits, mine)
    if failed := _failures(recipe, tree, after):
        raise KflexError(
            f"{recipe.id} would not take: {failed[0]}", str(tree.root), f"it is for {recipe.target}"
        )
    return Plan(recipe, known, tuple(edits), diff)


def _stands(recipe: Recipe, known: Mapping[str, str], tree: Tree) -> bool:
    applied = tree.get(recipe.id)
    if applied is None or applied.version != recipe.version or applied.facts.get("parameters") != dict(known):
        return False
    return not tree.edited(recipe.id) and not failures(recipe, tree)


def apply(made: Plan, tree: Tree) -> bool:
    """Make what is planned, all files or none; False where the tree is like that already."""
    recipe = made.recipe
    applied = tree.get(recipe.id)
    if applied and not made.diff and applied.version == recipe.version:
        return False
    tree.apply(recipe.id, recipe.version, made.edits, {"parameters": dict(made.parameters)})
    return True


def failures(recipe: Recipe, tree: Tree) -> list[str]:
    """The recipe's checks that the tree as it is does not pass."""
    return _failures(recipe, tree, {})


def status(recipe: Recipe, tree: Tree) -> Status:
    """Where a recipe stands in a tree."""
    applied = tree.get(recipe.id)
    if applied:
        edited = tree.edited(recipe.id)
        broken = [] if edited else failures(recipe, tree)
        state = (
            "edited" if edited or broken else "applied" if _current(recipe, applied.version) else "outdated"
        )
        detail = ", ".join(edited) or "; ".join(broken)
        if state == "outdated":
            detail = f"version {applied.version}, the recipe is {recipe.version}: apply it again"
        return Status(
            recipe.id, recipe.title, state, detail, applied.version, applied.when, tuple(applied.files)
        )
    if recipe.command:
        return Status(recipe.id, recipe.title, "applicable", f"with kflex-repro {recipe.command}")
    defaults = {name: 1 for name, parameter in recipe.parameters.items() if parameter.default is None}
    try:
        made = plan(recipe, tree, defaults)
    except KflexError as error:
        if recipe.checks and not failures(recipe, tree):
            return Status(recipe.id, recipe.title, "present", "the tree has it, not from us")
        return Status(recipe.id, recipe.title, "not applicable", str(error))
    return Status(recipe.id, recipe.title, "applicable", files=made.files)


def _current(recipe: Recipe, version: str) -> bool:
    return bool(recipe.command) or recipe.version == version


# -- steps


def _new_file(step: Step, known: Mapping[str, str], where: str) -> Edit:
    if step.source:
        path = recipes.directory() / step.source
        try:
            data = path.read_bytes()
        except OSError as error:
            raise KflexError(f"{where}: cannot read: {error.strerror}", str(path)) from None
    else:
        data = recipes.fill(step.new, known, where).encode()
    return Edit(step.file, 0, 0, data, create=True)


def _edits(step: Step, source: Source, known: Mapping[str, str], where: str) -> list[Edit]:
    """The edits of one step; everything it looks for must be there ``count`` times."""
    functions: list[Function | None] = [None]
    if step.function:
        functions = list(source.functions(step.function))
        _expect(
            len(functions), 1, [f.start for f in functions if f], source, f"function {step.function}", where
        )
    within = functions[0]
    what = label(step)
    edits: list[Edit] = []

    def put(start: int, end: int, text: str) -> None:
        # What is quoted of the file has its line ends already, and its bytes need not be UTF-8.
        data = text.encode("utf-8", "surrogateescape").replace(b"\r\n", b"\n").replace(b"\n", source.newline)
        edits.append(Edit(source.path, start, end, data))

    def filled(**more: bytes) -> str:
        texts = {key: value.decode("utf-8", "surrogateescape") for key, value in more.items()}
        return recipes.fill(step.new, {**known, **texts}, where)

    def spans(found: list[Span]) -> list[Span]:
        _expect(len(found), step.count, [span.start for span in found], source, what, where)
        return found

    if step.kind in ("call", "macro-argument"):
        macro = step.kind == "macro-argument"
        calls = source.macros(step.name, within) if macro else source.calls(step.name, within, step.of)
        _expect(len(calls), step.count, [call.start for call in calls], source, what, where)
        for call in calls:
            texts = _texts(call, source)
            span = Span(call.start, call.end)
            if step.argument is not None:
                if step.argument >= len(call.arguments):
                    raise KflexError(
                        f"{where}: {what} has no argument {step.argument}", _at(source, call.start)
                    )
                span = call.arguments[step.argument]
            _was(step, source, span, where)
            put(span.start, span.end, filled(**texts))
    elif step.kind == "string-literal":
        for span in spans(source.strings(step.name, within)):
            put(span.start, span.end, filled(was=source.text(span)))
    elif step.kind == "initializer":
        for span in spans(source.initializers(step.name)):
            _was(step, source, span, where)
            put(span.start, span.end, filled(was=source.text(span)))
    elif step.kind == "function":
        found = source.functions(step.name)
        _expect(len(found), step.count, [function.start for function in found], source, what, where)
        for function in found:
            at = {"before": source.above(function), "entry": function.entry, "after": function.end}[
                step.where
            ]
            text = filled()
            put(at, at, text if step.where == "before" else "\n" + text.removesuffix("\n"))
    elif step.kind == "include":
        lines = source.includes()
        if step.name:
            lines = [line for line in lines if line.name == step.name]
            _expect(len(lines), 1, [line.start for line in lines], source, what, where)
            put(lines[0].end, lines[0].end, f"\n#include {filled()}")
        else:
            at = lines[0].start if lines else 0
            put(at, at, f"#include {filled()}\n")
    else:
        found_at = _occurrences(source.data, step.name.encode().replace(b"\n", source.newline))
        for span in spans(found_at):
            put(span.start, span.end, filled())
    return [edit for edit in edits if source.data[edit.start : edit.end] != edit.new]


def _texts(call: Call, source: Source) -> dict[str, bytes]:
    arguments = [source.text(span) for span in call.arguments]
    inner = Span(call.arguments[0].start, call.arguments[-1].end) if call.arguments else Span(0, 0)
    return {
        "call": source.data[call.start : call.end],
        "callee": source.text(call.callee),
        "receiver": source.text(call.receiver),
        "arguments": source.text(inner),
        **{f"arg{i}": text for i, text in enumerate(arguments)},
    }


def _occurrences(data: bytes, wanted: bytes) -> list[Span]:
    found, at = [], data.find(wanted)
    while at >= 0:
        found.append(Span(at, at + len(wanted)))
        at = data.find(wanted, at + len(wanted))
    return found


def label(step: Step) -> str:
    """What a step looks for, in words."""
    what = {
        "call": f"call of {step.name}",
        "macro-argument": f"use of macro {step.name}",
        "string-literal": f'string "{step.name}"',
        "initializer": f"value of {step.name}",
        "function": f"function {step.name}",
        "include": f"#include of {step.name}",
        "text": f"text {step.name!r}",
        "new-file": "a new file",
    }[step.kind]
    on = f" on a call of {step.of}" if step.of else ""
    return what + on + (f" in {step.function}" if step.function else "")


def _expect(found: int, wanted: int, places: list[int], source: Source, what: str, where: str) -> None:
    if found == wanted:
        return
    lines = f":{one_line(places, source)}" if places else ""
    said = f"{found} times, {wanted} expected" if found else "not found"
    raise KflexError(
        f"{where}: {what}: {said}",
        source.path + lines,
        "another version of the sources, or edited by hand; nothing was changed",
    )


def _was(step: Step, source: Source, span: Span, where: str) -> None:
    # White space is the formatter's business.
    if step.was and source.text(span).split() != step.was.encode().split():
        raise KflexError(
            f"{where}: {label(step)} is not {step.was}",
            _at(source, span.start),
            "another version of the sources, or edited by hand; nothing was changed",
        )


def _at(source: Source, offset: int) -> str:
    return f"{source.path}:{source.line(offset)}"


# -- checks


def _failures(recipe: Recipe, tree: Tree, after: Mapping[str, bytes | None]) -> list[str]:
    present = {path: data for path, data in after.items() if data is not None}
    sources: dict[str, Source] = {}
    found = []
    for check in recipe.checks:
        path = tree.name(check.file)
        there = path in present or (path not in after and tree.exists(path))
        if not there or check.what == "file":
            if there != (check.count > 0):
                found.append(f"{path} is {'not ' if not there else ''}there")
            continue
        if path not in sources:
            data = present[path] if path in present else tree.read(path)
            sources[path] = Source(tree.root, path, data, present)
        count = _count(check, sources[path])
        if count != check.count:
            where = f" in {check.function}" if check.function else ""
            found.append(f"{check.what} {check.name}{where}: {count} in {path}, {check.count} expected")
    return found


def _count(check: Check, source: Source) -> int:
    within = None
    if check.function:
        functions = source.functions(check.function)
        if len(functions) != 1:
            return -1
        within = functions[0]
    if check.what == "call":
        return len(source.calls(check.name, within))
    if check.what == "string-literal":
        return len(source.strings(check.name, within))
    if check.what == "function":
        return len(source.functions(check.name))
    if check.what == "include":
        return sum(line.name == check.name for line in source.includes())
    return source.data.count(check.name.encode())
