"""Which recipes go into the copy that is built, and what of the user's tree decides it.

They are tried on a copy of their own, one after the other: what was planned there is what is done to the copy
that is kept, byte for byte, and the key of the build is made of it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kflex_repro import __version__
from kflex_repro.bpf import fs
from kflex_repro.build import artifact_source, cache
from kflex_repro.build.artifact import OBJECTS, Artifact, Changes
from kflex_repro.build.artifact_source import Source
from kflex_repro.errors import KflexError
from kflex_repro.heap import declarations, fit, model, verify
from kflex_repro.heap.layout import RECIPE as HEAP_SIZE
from kflex_repro.heap.layout import layout
from kflex_repro.heap.verify import CompiledHeap
from kflex_repro.patching import apply, recipe
from kflex_repro.patching.tree import Edit, Tree

# Where the artifact's program looks for cgroup v2; elsewhere a recipe must change it.
_CGROUP = Path("/sys/fs/cgroup")
CGROUP = "cgroup2-path"
_PLAN = "plan.json"


@dataclass(frozen=True)
class Said:
    """A recipe that was taken, or was not, and why."""

    id: str
    why: str


@dataclass(frozen=True)
class _Done:
    """A recipe as it was applied: what applies it again to the same bytes."""

    id: str
    version: str
    edits: tuple[Edit, ...]
    facts: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """What was chosen; ``gb`` is what the heaps were fitted to, None where they are as in the tree."""

    taken: tuple[Said, ...]
    left: tuple[Said, ...]
    warnings: tuple[str, ...]
    changes: Changes
    gb: int | None

    @property
    def recipes(self) -> tuple[str, ...]:
        """The recipes that the copy has."""
        return tuple(said.id for said in self.taken)


def _default(name: str) -> str:
    """Why a recipe is taken unless the user says otherwise; "" if it is not."""
    if name == "address-search":
        return "the heap's address is looked for from the real end of user space"
    if name == "out-of-heap":
        return "a full heap is said, and not an abort"
    root = fs.cgroup2_root()
    if name == CGROUP and root not in (None, _CGROUP):
        return f"cgroup v2 is at {root} here"
    return ""


def _not_default(name: str) -> str:
    if name == CGROUP:
        return f"cgroup v2 is at {_CGROUP} here, where the program looks"
    if name == HEAP_SIZE:
        return "--heap-gb N or auto takes it"
    return f"--recipe {name} takes it"


@dataclass(frozen=True)
class _Planned:
    """What became of the recipes that were tried, in order."""

    done: tuple[_Done, ...]
    left: tuple[Said, ...]


def _plan(tree: Tree, names: Sequence[str], wanted: Sequence[str]) -> _Planned:
    """Apply recipes one after the other; those that are not ``wanted`` may be impossible."""
    done: list[_Done] = []
    left: list[Said] = []
    for name in names:
        loaded = recipe.load(name)
        try:
            made = apply.plan(loaded, tree)
        except KflexError as error:
            if name in wanted:
                raise
            where = error.where.replace(str(tree.root), "the tree")
            left.append(Said(name, f"{error.what} ({where})" if where else error.what))
            continue
        apply.apply(made, tree)
        done.append(_Done(name, loaded.version, made.edits, {"parameters": dict(made.parameters)}))
    return _Planned(tuple(done), tuple(left))


def _kept_plan(source: Source, tree: Tree, names: Sequence[str], wanted: Sequence[str]) -> _Planned:
    """The same, from the cache where this tree was planned before: reading it takes libclang seconds."""
    recipes = [
        part
        for path in sorted(recipe.directory().rglob("*"))
        if path.is_file()
        for part in (path.name, cache.file_digest(path))
    ]
    state = [f"{one.name} {one.version}" for one in tree.applied()]
    key = cache.digest([__version__, *names, *state, *recipes, *artifact_source.content(source.root)])
    planned: _Planned | None = None

    def plan(out: Path) -> None:
        nonlocal planned
        planned = _plan(tree, names, wanted)
        (out / _PLAN).write_text(_as_text(planned))

    place, _ = cache.obtain("artifact-recipes", key, plan)
    if planned is None:
        planned = _from_text((place / _PLAN).read_text())
        _again(planned.done, tree)
        if failed := next((said for said in planned.left if said.id in wanted), None):
            raise KflexError(failed.why, "", f"leave out --recipe {failed.id}")
    return planned


def _as_text(planned: _Planned) -> str:
    table = asdict(planned)
    for one in table["done"]:
        for edit in one["edits"]:
            edit["new"] = base64.b64encode(edit["new"]).decode()
    return json.dumps(table)


def _from_text(text: str) -> _Planned:
    table = json.loads(text)
    for one in table["done"]:
        one["edits"] = tuple(Edit(**{**edit, "new": base64.b64decode(edit["new"])}) for edit in one["edits"])
    return _Planned(
        tuple(_Done(**one) for one in table["done"]), tuple(Said(**said) for said in table["left"])
    )


@contextlib.contextmanager
def _copy(source: Source) -> Iterator[Tree]:
    """A copy of the tree to try things on; what fails there is told of the tree itself."""
    with tempfile.TemporaryDirectory(prefix="kflex-recipes-") as scratch:
        root = Path(scratch).resolve() / "tree"
        artifact_source.copy(source.root, root)
        try:
            yield Tree.open(root)
        except KflexError as error:
            where, fix = (text.replace(str(root), str(source.root)) for text in (error.where, error.fix))
            raise KflexError(error.what, where, fix, error.exit_code) from None


def choose(
    source: Source, wanted: Sequence[str] = (), without: Sequence[str] = (), heap_gb: str | None = None
) -> Choice:
    """Choose and plan the recipes. ``wanted`` must be possible, the usual ones are taken where they are.

    KflexError for an unknown or impossible recipe, and for heaps that cannot have that size here.
    """
    for name in (*wanted, *without):
        recipe.load(name)
    if both := sorted(set(wanted) & set(without)):
        raise KflexError(f"--recipe and --no-recipe {both[0]} at once", "", "leave one of them out")
    if HEAP_SIZE in wanted and heap_gb is None:
        raise KflexError(f"recipe {HEAP_SIZE} wants a size", "", "--heap-gb N or auto")
    gb = None if heap_gb in (None, "auto") else model.parse_gb(str(heap_gb), "--heap-gb")
    taken: list[Said] = []
    left: list[Said] = []
    warnings: list[str] = []
    fitted: fit.Plan | None = None
    with _copy(source) as tree:
        why: dict[str, str] = {}
        for name in recipe.names():
            files = recipe.load(name).files
            if name not in wanted and files and not any(tree.exists(file) for file in files):
                continue  # for other sources than these
            reason = "asked for" if name in wanted else _default(name)
            if tree.get(name) and (name != HEAP_SIZE or heap_gb is None):
                taken.append(Said(name, "is in the tree already"))
            elif name == HEAP_SIZE and heap_gb is not None:
                continue
            elif name in without or not reason:
                left.append(Said(name, "not wanted" if name in without else _not_default(name)))
            else:
                why[name] = reason
        planned = _kept_plan(source, tree, list(why), wanted)
        left += planned.left
        taken += [Said(one.id, why[one.id]) for one in planned.done]
        done = list(planned.done)
        if heap_gb is not None:
            fitted = _fit(tree, gb)
            done.append(_Done(HEAP_SIZE, __version__, tuple(fitted.edits), {"gb": fitted.gb}))
            taken.append(Said(HEAP_SIZE, f"heaps of {fitted.gb} GB, with capacities that fit"))
            warnings += fit.warnings(tree, fitted, model.machine())
    return Choice(tuple(taken), tuple(left), tuple(warnings), _changes(done), fitted.gb if fitted else None)


def _fit(tree: Tree, gb: int | None) -> fit.Plan:
    """Fit the heaps of the copy, so that what it warns of is of the tree with the other recipes in it."""
    machine, before = model.machine(), fit.before(tree)
    if gb is None:
        return fit.largest(tree.root, layout(), machine, changed=before)
    return fit.plan(tree.root, layout(), gb, machine, changed=before)


def _again(done: Sequence[_Done], tree: Tree) -> None:
    for one in done:
        if one.edits:
            tree.apply(one.id, one.version, one.edits, one.facts)
        elif tree.get(one.id):
            # The tree was fitted to another size before; this one is its own.
            tree.revert(one.id)


def _changes(done: Sequence[_Done]) -> Changes:
    key: list[str] = []
    for one in done:
        key += [one.id, one.version]
        for edit in one.edits:
            key += [edit.path, str(edit.start), str(edit.end), cache.digest([edit.new]), str(edit.create)]
    return Changes(tuple(key), lambda root: _again(done, Tree.open(root)))


def verify_heaps(made: Artifact, choice: Choice) -> tuple[CompiledHeap, ...]:
    """The heaps of the compiled objects: they must be what they were fitted to, or what the copy declares."""
    declared = None
    if choice.gb is None and made.step(OBJECTS).state == "built":
        declared = verify.expected(declarations.find(made.tree, layout().heaps))
    return tuple(verify.verify(made.objects, declared, choice.gb))
