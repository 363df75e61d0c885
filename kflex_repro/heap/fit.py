"""Heaps and capacities of a KFlex tree, fitted to a size: what to write where, or why it cannot work.

Always planned from the tree as it was before an earlier fit, so that the way there does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kflex_repro.errors import KflexError
from kflex_repro.heap import capacities, declarations, model, search
from kflex_repro.heap.capacities import Capacity, CapacityShape
from kflex_repro.heap.declarations import Declaration, Mention
from kflex_repro.heap.layout import RECIPE, Layout
from kflex_repro.patching.tree import Edit, Tree

_SEARCH_RECIPE = "address-search"


@dataclass(frozen=True)
class Change:
    """One number of the tree: ``was`` and ``now`` as source text, ``before`` and ``after`` as numbers.

    ``kind`` is heap (GB) or capacity (objects). ``before`` is None where the old text is no constant.
    """

    kind: str
    name: str
    path: str
    line: int
    start: int
    end: int
    was: str
    now: str
    before: int | None
    after: int
    notes: tuple[str, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether anything is written."""
        return self.was != self.now


@dataclass(frozen=True)
class Plan:
    """What fitting a tree to ``gb`` means; nothing is written yet."""

    gb: int
    changes: tuple[Change, ...]
    left_alone: tuple[Mention, ...]
    warnings: tuple[str, ...]

    @property
    def edits(self) -> list[Edit]:
        """The bytes to replace."""
        return [
            Edit(change.path, change.start, change.end, change.now.encode())
            for change in self.changes
            if change.changes
        ]


def heaps_of(found: Sequence[Declaration], gb: int) -> dict[str, list[model.Heap]]:
    """The heaps by the compiled file they are in. Those of one file exist together, others never do.

    The user-space program runs one mode, the benchmark one fixture at a time: each loads one object.
    """
    together: dict[str, list[model.Heap]] = {}
    for item in found:
        for target in item.objects:
            together.setdefault(target, []).extend(
                model.Heap(name=_label(target, name), gb=gb, file=target, line=item.line)
                for name in item.names or ("heap",)
            )
    return together


def _label(target: str, name: str) -> str:
    return f"{Path(target).name.partition('.')[0]}.{name}"


def problems(
    found: Sequence[Declaration], filled: Sequence[tuple[CapacityShape, int]], gb: int, machine: model.Machine
) -> list[model.Problem]:
    """All that keeps heaps of ``gb`` with these capacities from working on a machine."""
    together = heaps_of(found, gb)
    result = [problem for heaps in together.values() for problem in model.check(heaps, machine, {})]
    for shape, objects in filled:
        heap = model.Heap(_label(shape.object, shape.map), gb, shape.object)
        allocator = shape.allocator(objects, machine.cpus)
        result += [
            replace(problem, what=f"{problem.what} ({shape.name})")
            for problem in model.check([heap], machine, {heap.name: objects}, allocator)
            if problem.id == "capacity"
        ]
    return result


def plan(
    root: Path,
    layout: Layout,
    gb: int,
    machine: model.Machine,
    *,
    keep_capacities: bool = False,
    changed: Mapping[str, bytes] | None = None,
) -> Plan:
    """Plan heaps of ``gb`` GB each. ``changed`` are files to read as if they were so (an earlier fit undone).

    KflexError with the numbers, and the nearest size that works, where it cannot work.
    """
    found = declarations.find(root, layout.heaps, changed)
    if not found.declarations:
        raise KflexError(
            f"no {layout.heaps.macro}() declaration in {', '.join(layout.heaps.files)}",
            str(root),
            "give a KFlex source tree with --source",
        )
    present = {target for item in found.declarations for target in item.objects}
    changes = [_heap_change(item, gb) for item in found.declarations]
    filled, warnings = [], []
    for shape in layout.capacities:
        if shape.object not in present:
            continue
        try:
            constant = capacities.find(root, shape, changed)
            change = _capacity_change(constant, gb, machine, keep_capacities)
        except KflexError as error:
            if not keep_capacities and (root / shape.path).is_file():
                raise
            warnings.append(f"the capacity of {shape.object} was not checked: {error.what} ({error.where})")
        else:
            changes.append(change)
            filled.append((shape, change.after))
    refuse(problems(found.declarations, filled, gb, machine), gb, machine, keep_capacities)
    made = Plan(gb, tuple(changes), found.mentions, tuple(warnings))
    _confirm(layout, made, _after(root, layout, made, changed) if made.edits else found)
    return made


def largest(
    root: Path,
    layout: Layout,
    machine: model.Machine,
    *,
    keep_capacities: bool = False,
    changed: Mapping[str, bytes] | None = None,
) -> Plan:
    """The plan with the largest heaps that work on a machine."""
    gb = model.auto_gb(machine)
    refusal: KflexError | None = None
    while gb >= 1:
        try:
            return plan(root, layout, gb, machine, keep_capacities=keep_capacities, changed=changed)
        except Refused as error:
            refusal = error
            gb //= 2
    raise refusal or KflexError(
        f"no heap fits: {machine.ram_available / model.GIB:.1f} GB of RAM are free, the smallest takes 1 GB",
        "--auto",
        "free some memory",
    )


class Refused(KflexError):
    """A size that cannot work here."""


def refuse(found: Sequence[model.Problem], gb: int, machine: model.Machine, kept: bool = False) -> None:
    """Raise for the first problem, with how many more there are and the nearest size that works."""
    if not found:
        return
    first = found[0]
    same = [problem for problem in found if problem.id == first.id]
    more = f" (and {len(same) - 1} more like it)" if len(same) > 1 else ""
    nearest = [problem.nearest_gb for problem in same if problem.nearest_gb is not None]
    # Of capacities, all must fit; and what they fit into must itself work here.
    size = 0 if not nearest else max(nearest) if first.id == "capacity" else min(nearest)
    if first.id == "capacity" and model.check([model.Heap("", size)], machine, {}):
        size = 0
    fix = f"the nearest size that works is {size} GB" if size else "no size works on this machine"
    if first.id == "capacity" and kept:
        fix += "; or leave out --keep-capacities"
    raise Refused(first.what + more, f"--gb {gb}", fix)


def _heap_change(item: Declaration, gb: int) -> Change:
    notes = []
    if item.gb is None and item.value is not None:
        notes.append(f"`{item.text}` is {item.value}, but the macro does not make {item.value} GB of it")
    elif item.gb is None:
        notes.append(f"`{item.text}` is no constant that can be read here")
    if item.macros:
        notes.append(f"written at the use: {', '.join(item.macros)} itself stays as it is")
    # An expression that already is the size stays; only what the compiler makes of it counts.
    now = item.text if item.gb == gb else str(gb)
    return Change(
        "heap",
        item.label,
        item.path,
        item.line,
        item.start,
        item.end,
        item.text,
        now,
        item.gb,
        gb,
        tuple(notes) if now != item.text else (),
    )


def _capacity_change(constant: Capacity, gb: int, machine: model.Machine, keep: bool) -> Change:
    value = constant.value
    if value is None:
        raise KflexError(
            f"{constant.shape.name} is `{constant.text}`, no constant that can be read",
            constant.where,
            "write a number there, or give --keep-capacities and check it yourself",
        )
    allocator = constant.shape.allocator(value, machine.cpus)
    most = model.largest_objects(gb, allocator)
    after = value if keep or value <= most else capacities.readable(most)
    now = constant.text if after == value else capacities.written(after, constant.text)
    return Change(
        "capacity",
        constant.shape.name,
        constant.shape.path,
        constant.line,
        constant.start,
        constant.end,
        constant.text,
        now,
        value,
        after,
    )


def _after(root: Path, layout: Layout, made: Plan, changed: Mapping[str, bytes] | None) -> declarations.Found:
    """The declarations as they will be."""
    after = dict(changed or {})
    for path in {edit.path for edit in made.edits}:
        data = after[path] if path in after else (root / path).read_bytes()
        after[path] = replaced(data, [edit for edit in made.edits if edit.path == path])
    return declarations.find(root, layout.heaps, after)


def _confirm(layout: Layout, made: Plan, after: declarations.Found) -> None:
    """Every heap must compile to the planned size."""
    for item in after.declarations:
        if item.pages is not None and item.gb != made.gb:
            raise KflexError(
                f"{layout.heaps.macro}({item.text}, …) makes a heap of {item.pages:,} pages, "
                f"not of {made.gb * model.PAGES_PER_GB:,}",
                item.where,
                f"the tree's {layout.heaps.macro} is not the one this is for",
            )


def replaced(data: bytes, edits: Sequence[Edit]) -> bytes:
    """``data`` with edits made in it."""
    for edit in sorted(edits, key=lambda edit: edit.start, reverse=True):
        data = data[: edit.start] + edit.new + data[edit.end :]
    return data


@dataclass(frozen=True)
class Outcome:
    """What is done to a tree: a unified diff, empty where nothing changes."""

    plan: Plan
    diff: str

    @property
    def files(self) -> int:
        """How many files change."""
        return sum(line.startswith("+++ ") for line in self.diff.splitlines())


def before(tree: Tree) -> dict[str, bytes]:
    """The files that an earlier fit changed, as they were before it."""
    applied = tree.get(RECIPE)
    return {path: tree.read(path, without=RECIPE) for path in applied.files} if applied else {}


def warnings(tree: Tree, made: Plan, machine: model.Machine) -> list[str]:
    """What to know before, or after, applying a plan."""
    lines = list(made.warnings)
    outcome = search.on_paper(search.artifact(made.gb * model.GIB), search.task_size(machine.va_bits))
    if outcome.address is None and tree.get(_SEARCH_RECIPE) is None:
        lines.append(
            f"the artifact's libbpf finds no address for {made.gb} GB: its {outcome.tried} tries lie above "
            f"{machine.va_bits} bits of user space; `kflex-repro patch apply {_SEARCH_RECIPE}` mends that"
        )
    return lines


def preview(tree: Tree, made: Plan) -> Outcome:
    """The diff from the tree as it is to what is planned."""
    return Outcome(made, tree.diff(made.edits, without=RECIPE))


def apply(tree: Tree, made: Plan, version: str = "1") -> Outcome:
    """Make the tree what is planned, all files or none; originals are kept in the tree's state directory."""
    outcome = preview(tree, made)
    if outcome.diff and not made.edits:
        tree.revert(RECIPE)
    elif outcome.diff:
        facts = {"gb": made.gb, **{change.name: change.after for change in made.changes}}
        tree.apply(RECIPE, version, made.edits, facts)
    return outcome
