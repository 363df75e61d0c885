"""A user's tree changed all or nothing, and exactly back: the transaction under every recipe."""

from __future__ import annotations

import functools
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kflex_repro.errors import KflexError
from kflex_repro.patching.tree import STATE_DIRECTORY, Edit, Tree
from tests.conftest import require
from tests.cut_short import cut_at, small_disk

Snapshot = dict[str, tuple[bytes, int]]


def snapshot(root: Path) -> Snapshot:
    """Every file and directory outside our state, with its content and mode."""
    return {
        str(path.relative_to(root)): (path.read_bytes() if path.is_file() else b"", path.stat().st_mode)
        for path in sorted(root.rglob("*"))
        if STATE_DIRECTORY not in path.relative_to(root).parts and ".git" not in path.relative_to(root).parts
    }


def at(tree: Tree, path: str, old: bytes, new: bytes, without: str = "") -> Edit:
    """The edit that replaces the one occurrence of ``old``."""
    content = tree.read(path, without)
    assert content.count(old) == 1
    start = content.index(old)
    return Edit(path, start, start + len(old), new)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    place = tmp_path / "tree"
    (place / "src").mkdir(parents=True)
    (place / "a.c").write_bytes(b"one\ntwo\nthree\nfour\nfive\n")
    (place / "src" / "b.c").write_bytes(b"alpha\r\nbeta \xff\xfe\r\ngamma")
    (place / "src" / "b.c").chmod(0o640)
    return place


def edits(tree: Tree) -> list[Edit]:
    return [
        at(tree, "a.c", b"two", b"TWO!"),
        at(tree, "src/b.c", b"beta", b"BETA"),
        Edit("new/deep/c.h", 0, 0, b"made\n", create=True),
    ]


def test_a_change_of_several_files_is_made_and_taken_back_byte_for_byte(root: Path) -> None:
    before = snapshot(root)
    tree = Tree.open(root)
    tree.apply("first", "1", edits(tree), {"gb": 4})

    assert (root / "a.c").read_bytes() == b"one\nTWO!\nthree\nfour\nfive\n"
    assert (root / "src/b.c").read_bytes() == b"alpha\r\nBETA \xff\xfe\r\ngamma"
    assert stat.S_IMODE((root / "src/b.c").stat().st_mode) == 0o640
    assert (root / "new/deep/c.h").read_bytes() == b"made\n"
    (applied,) = Tree.open(root).applied()
    assert (applied.name, applied.version, dict(applied.facts)) == ("first", "1", {"gb": 4})
    assert applied.files == ("a.c", "new/deep/c.h", "src/b.c")
    assert (root / STATE_DIRECTORY / "backup/src/b.c").read_bytes() == before["src/b.c"][0]

    Tree.open(root).revert("first")
    assert snapshot(root) == before
    assert Tree.open(root).applied() == []
    assert not list((root / STATE_DIRECTORY / "backup").glob("**/*.c"))


def test_the_diff_is_what_patch_would_make_of_the_tree(root: Path, tmp_path: Path) -> None:
    tree = Tree.open(root)
    diff = tree.diff(edits(tree))
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    tree.apply("first", "1", edits(tree))
    subprocess.run(
        ["git", "apply", "-p1", "--whitespace=nowarn"],
        cwd=copy,
        input=diff.encode("utf-8", "surrogateescape"),
        check=True,
    )
    assert {k: v[0] for k, v in snapshot(copy).items()} == {k: v[0] for k, v in snapshot(root).items()}


def test_one_recipe_is_reverted_under_another(root: Path) -> None:
    before = snapshot(root)
    tree = Tree.open(root)
    tree.apply("first", "1", edits(tree))
    tree.apply("second", "1", [at(tree, "a.c", b"one", b"0\n1"), at(tree, "a.c", b"three\n", b"")])
    tree.revert("first")
    assert (root / "a.c").read_bytes() == b"0\n1\ntwo\nfour\nfive\n"
    assert [item.name for item in Tree.open(root).applied()] == ["second"]
    tree.revert("second")
    assert snapshot(root) == before


def test_a_recipe_applied_again_is_replaced_in_one_step(root: Path) -> None:
    before = snapshot(root)
    tree = Tree.open(root)
    tree.apply("first", "1", edits(tree))
    tree.apply("first", "2", [at(tree, "a.c", b"two", b"2", without="first")])
    assert (root / "a.c").read_bytes() == b"one\n2\nthree\nfour\nfive\n"
    assert not (root / "new").exists()
    assert (root / "src/b.c").read_bytes() == before["src/b.c"][0]
    tree.revert("first")
    assert snapshot(root) == before


def test_what_another_recipe_wrote_is_not_changed(root: Path) -> None:
    tree = Tree.open(root)
    tree.apply("first", "1", edits(tree))
    before = snapshot(root)
    with pytest.raises(KflexError, match=r"second would change what first changed \(a.c:2\)"):
        tree.apply("second", "1", [at(tree, "src/b.c", b"alpha", b"x"), at(tree, "a.c", b"TWO", b"2")])
    assert snapshot(root) == before


def test_edits_by_hand_elsewhere_survive_a_revert(root: Path) -> None:
    tree = Tree.open(root)
    tree.apply("first", "1", edits(tree))
    mine = (root / "a.c").read_bytes().replace(b"five", b"5\n6\n7").replace(b"one\n", b"zero\none\n")
    (root / "a.c").write_bytes(mine)
    Tree.open(root).revert("first")
    assert (root / "a.c").read_bytes() == mine.replace(b"TWO!", b"two")


def test_an_edit_by_hand_of_what_we_wrote_is_named_and_nothing_reverted(root: Path) -> None:
    tree = Tree.open(root)
    tree.apply("first", "1", edits(tree))
    (root / "a.c").write_bytes(
        (root / "a.c").read_bytes().replace(b"TWO!", b"mine").replace(b"one", b"0\none")
    )
    before = snapshot(root)
    assert Tree.open(root).edited("first") == ["a.c:3"]
    with pytest.raises(KflexError, match=r"edited since first was applied \(a.c:3\)"):
        Tree.open(root).revert("first")
    assert snapshot(root) == before

    Tree.open(root).revert("first", keep_edited=True)
    assert (root / "a.c").read_bytes() == b"0\none\nmine\nthree\nfour\nfive\n"
    assert b"beta" in (root / "src/b.c").read_bytes()
    assert not (root / "new").exists()


@pytest.mark.parametrize("what", ["removed", "edited"])
def test_a_file_of_ours_that_the_user_took_over_is_kept(root: Path, what: str) -> None:
    tree = Tree.open(root)
    tree.apply("first", "1", edits(tree))
    made = root / "new/deep/c.h"
    if what == "removed":
        made.unlink()
    else:
        made.write_bytes(b"made\nand kept\n")
    line = 1 if what == "removed" else 2
    with pytest.raises(KflexError, match=rf"edited since first was applied \(new/deep/c.h:{line}\)"):
        tree.revert("first")
    tree.revert("first", keep_edited=True)
    assert made.exists() == (what == "edited")
    assert (root / "a.c").read_bytes().startswith(b"one\ntwo\n")


def _read_only_file(root: Path) -> None:
    (root / "src/b.c").chmod(0o444)


def _read_only_directory(root: Path) -> None:
    (root / "src").chmod(0o555)


def _link_out(root: Path) -> None:
    outside = root.parent / "outside.c"
    outside.write_bytes(b"beta\n")
    (root / "src/b.c").unlink()
    (root / "src/b.c").symlink_to(outside)


def _link_loop(root: Path) -> None:
    (root / "src/b.c").unlink()
    (root / "src/b.c").symlink_to("b.c")


def _missing(root: Path) -> None:
    (root / "src/b.c").unlink()


def _state_in_the_way(root: Path) -> None:
    (root / STATE_DIRECTORY).symlink_to(root.parent)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_read_only_file, r"the file is read-only \(src/b.c\)"),
        (_read_only_directory, r"the directory is read-only \(.*src\)"),
        (_link_out, r"leads out of the tree \(src/b.c\)"),
        (_link_loop, r"\(src/b.c\)"),
        (_missing, r"there is no such file \(src/b.c\)"),
        (_state_in_the_way, r"not a directory of ours"),
    ],
)
def test_what_cannot_be_changed_is_refused_before_anything_is(
    root: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(root)
    before = (root / "a.c").read_bytes()
    try:
        with pytest.raises(KflexError, match=message):
            Tree.open(root).apply("first", "1", [Edit("a.c", 0, 3, b"ONE"), Edit("src/b.c", 0, 1, b"A")])
        assert (root / "a.c").read_bytes() == before
        assert not list(root.rglob("*.kflex-repro-new"))
    finally:
        (root / "src").chmod(0o755)


@pytest.mark.parametrize(
    "edit",
    [
        Edit("../x", 0, 0, b"", create=True),
        Edit("/etc/x", 0, 0, b"", create=True),
        Edit(f"{STATE_DIRECTORY}/x", 0, 0, b"", create=True),
        Edit("a.c", 0, 0, b"", create=True),
        Edit("a.c", 20, 99, b""),
        Edit("a.c", -1, 0, b""),
    ],
)
def test_edits_that_make_no_sense_are_refused(root: Path, edit: Edit) -> None:
    before = snapshot(root)
    with pytest.raises(KflexError):
        Tree.open(root).apply("first", "1", [Edit("src/b.c", 0, 1, b"A"), edit])
    assert snapshot(root) == before


@pytest.mark.parametrize("place", ["nowhere", "tree/a.c"])
def test_a_tree_that_is_none_is_one_line(root: Path, place: str) -> None:
    with pytest.raises(KflexError, match="--source"):
        Tree.open(root.parent / place)


def test_a_full_disk_changes_nothing(root: Path) -> None:
    require("root", "capabilities")  # mounts a small file system
    with small_disk("256k") as place:
        shutil.copytree(root, place / "tree")
        before = snapshot(place / "tree")
        tree = Tree.open(place / "tree")
        for size in (110_000, 300_000):
            with pytest.raises(KflexError, match="No space left"):
                tree.apply("first", "1", [Edit("a.c", 0, 3, b"1"), Edit("src/b.c", 0, 1, b"x" * size)])
            assert snapshot(place / "tree") == before
        assert Tree.open(place / "tree").applied() == []


def test_a_second_process_is_kept_out_while_one_changes_the_tree(root: Path) -> None:
    tree = Tree.open(root)
    with tree._changing(), pytest.raises(KflexError, match="another kflex-repro is changing this tree"):
        Tree.open(root).apply("first", "1", [Edit("a.c", 0, 3, b"ONE")])


def test_only_changes_git_does_not_have_are_warned_of(root: Path) -> None:
    assert Tree.open(root).warnings() == []
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], cwd=root, check=True)
    tree = Tree.open(root)
    assert tree.warnings() == []
    tree.apply("first", "1", edits(tree))
    assert tree.warnings() == [], "our own change is not the user's"
    (root / "a.c").write_bytes((root / "a.c").read_bytes() + b"mine\n")
    (warning,) = tree.warnings()
    assert "uncommitted" in warning and "a.c" in warning
    shown = subprocess.run(
        ["git", "status", "--porcelain"], cwd=root, check=True, capture_output=True, text=True
    )
    assert STATE_DIRECTORY not in shown.stdout


def test_a_damaged_record_is_one_line(root: Path) -> None:
    tree = Tree.open(root)
    tree.apply("first", "1", edits(tree))
    state = root / STATE_DIRECTORY / "state.json"
    good = state.read_bytes()
    for bad in (b"", b"\0" * 50, good[:-30], b"[]", b"{}", good.replace(b'"hunks"', b'"hinks"')):
        state.write_bytes(bad)
        with pytest.raises(KflexError, match="damaged"):
            Tree.open(root)


# -- killed anywhere


def touches(event: str, _args: tuple[object, ...]) -> bool:
    return event in {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.utime", "os.chmod", "open"}


def stopped_at(step: int, change: Callable[[], None], kill: bool = True) -> bool:
    """Run a change in a child that is killed or interrupted at its ``step``-th touch of the disk; whether."""
    return cut_at(step, change, touches, kill)


@pytest.mark.parametrize(
    ("what", "kill"),
    [("apply", True), ("replace", True), ("revert", True), ("recover", True), ("replace", False)],
)
def test_stopped_at_any_point_the_tree_is_all_old_or_all_new(
    root: Path, tmp_path: Path, what: str, kill: bool
) -> None:
    tree = Tree.open(root)
    if what != "apply":
        tree.apply("first", "1", edits(tree))

    def change(place: Path) -> None:
        opened = Tree.open(place)
        if what == "revert":
            opened.revert("first")
        elif what == "replace":
            new = at(opened, "a.c", b"two", b"2", "first"), at(opened, "src/b.c", b"gamma", b"g", "first")
            opened.apply("first", "2", new)
        elif what == "apply":
            opened.apply("first", "1", edits(opened))

    if what == "recover":
        # A change that was decided and killed before its first rename; opening the tree finishes it.
        half = tmp_path / "half"
        shutil.copytree(root, half)
        step = 1
        while stopped_at(step, lambda: Tree.open(half).revert("first")) and not (
            (half / STATE_DIRECTORY / "commit.json").exists() and not (half / "new").exists()
        ):
            shutil.rmtree(half)
            shutil.copytree(root, half)
            step += 1
        assert (half / STATE_DIRECTORY / "commit.json").exists()
        start = half
    else:
        start = root
    old = snapshot(start)
    done = tmp_path / "done"
    shutil.copytree(start, done)
    change(done)
    new = snapshot(done)
    assert what == "recover" or new != old

    step, seen = 0, set()
    while True:
        step += 1
        place = tmp_path / "killed"
        shutil.copytree(start, place)
        stopped = stopped_at(step, functools.partial(change, place), kill)
        if not kill:
            # Ctrl-C tidies up itself: no one has to open the tree again for its files to be right.
            here = {path: data for path, (data, mode) in snapshot(place).items() if stat.S_ISREG(mode)}
            assert here in [{p: d for p, (d, m) in s.items() if stat.S_ISREG(m)} for s in (old, new)]
        names = [item.version for item in Tree.open(place).applied()]
        now = snapshot(place)
        assert now in (old, new), f"mixed after a stop at step {step}"
        if what != "recover":
            expected = {"apply": (["1"], []), "replace": (["2"], ["1"]), "revert": ([], ["1"])}[what]
            assert names == expected[0 if now == new else 1]
        else:
            assert now == new and names == []
        seen.add(now == new)
        # The tree is fit for use: what was interrupted can be done.
        if what == "apply" and not names:
            change(place)
            assert snapshot(place) == new
        shutil.rmtree(place)
        if not stopped:
            break
    assert step > (8 if what == "recover" else 20)
    assert seen == ({True} if what == "recover" else {True, False})


# -- any recipes, any order


@settings(max_examples=60, deadline=None)
@given(
    content=st.binary(max_size=60),
    data=st.data(),
)
def test_any_recipes_reverted_in_any_order_leave_the_original(content: bytes, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        (root / "f").write_bytes(content)
        tree = Tree.open(root)
        applied = []
        for name in ("a", "b", "c"):
            size = len(tree.read("f"))
            cuts = sorted(
                data.draw(st.lists(st.integers(0, size), max_size=4).filter(lambda v: len(v) % 2 == 0))
            )
            wanted = [
                Edit("f", start, end, data.draw(st.binary(max_size=6)))
                for start, end in zip(cuts[::2], cuts[1::2], strict=True)
            ]
            before = tree.read("f")
            try:
                tree.apply(name, "1", wanted)
            except KflexError:
                assert tree.read("f") == before
                continue
            assert tree.read("f", without=name) == before
            applied.append(name)
        for name in data.draw(st.permutations(applied)):
            Tree.open(root).revert(name)
        assert (root / "f").read_bytes() == content


@settings(max_examples=100, deadline=None)
@given(
    recipe=st.sets(st.integers(0, 11)),
    mine=st.dictionaries(st.integers(0, 11), st.sampled_from(["remove", "replace", "insert"])),
    end=st.sampled_from([b"\n", b"\r\n"]),
)
def test_edits_by_hand_between_ours_survive_a_revert(
    recipe: set[int], mine: dict[int, str], end: bytes
) -> None:
    original = [b"line %d" % i + end for i in range(12)]

    def by_hand(lines: list[bytes]) -> bytes:
        out = []
        for i, line in enumerate(lines):
            edit = mine.get(i, "") if i not in recipe else ""
            new = {"": [line], "remove": [], "replace": [b"mine" + end], "insert": [line, b"more" + end]}[
                edit
            ]
            out += new
        return b"".join(out)

    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        (root / "f").write_bytes(b"".join(original))
        tree = Tree.open(root)
        starts = [sum(map(len, original[:i])) for i in range(12)]
        tree.apply("r", "1", [Edit("f", starts[i], starts[i] + 4, b"OURS") for i in sorted(recipe)])
        ours = (root / "f").read_bytes().splitlines(keepends=True)
        (root / "f").write_bytes(by_hand(ours))
        assert Tree.open(root).edited("r") == []
        Tree.open(root).revert("r")
        assert (root / "f").read_bytes() == by_hand(original)
