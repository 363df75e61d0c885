"""Compiled objects have the heaps that the fitted tree says; anything else is one line."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from kflex_repro.build import toolchain
from kflex_repro.cli import main
from kflex_repro.errors import KflexError
from kflex_repro.heap import declarations, fit, verify
from kflex_repro.heap.layout import layout
from kflex_repro.patching.tree import Tree
from tests.artifact import golden
from tests.conftest import unavailable

Compiled = tuple[Path, list[Path]]


def _compile(root: Path) -> list[Path]:
    if toolchain.find_clang() is None:
        unavailable("clang is not installed")
    objects = []
    for source in sorted((root / "bpf").glob("*.bpf.c")):
        made = source.with_suffix(".o")
        flags = ["-O2", "-g", "-target", "bpf", f"-I{root}/bpf/include", f"-I{root}/bpf"]
        subprocess.run([toolchain.clang().path, *flags, "-c", str(source), "-o", str(made)], check=True)
        objects.append(made)
    return objects


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The synthetic tree, fitted to 4 GB and compiled."""
    root = Path(shutil.copytree(golden.TREE, tmp_path_factory.mktemp("verify") / "tree"))
    fit.apply(Tree.open(root), fit.plan(root, layout(), 4, golden.MACHINE))
    return root, _compile(root)


def _verify(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capfd.readouterr()
    code = main(["fit-heap", "--verify", *map(str, arguments)])
    return code, *capfd.readouterr()


def test_the_objects_of_a_fitted_tree_are_right(
    compiled: Compiled, capfd: pytest.CaptureFixture[str]
) -> None:
    root, objects = compiled
    code, out, _ = _verify(capfd, "--source", root, "--json", *objects)
    heaps = json.loads(out)["heaps"]
    assert code == 0 and len(heaps) == len(objects) == 4
    assert {(heap["name"], heap["pages"], heap["expected_gb"]) for heap in heaps} == {("heap", 1048576, 4)}


def test_a_heap_is_known_by_its_shape_without_a_tree(
    compiled: Compiled, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = _verify(capfd, *compiled[1])
    assert code == 0 and out.count("heap, 4 GB, 1,048,576 pages") == 4
    assert _verify(capfd, "--gb", "4", *compiled[1])[0] == 0


def test_an_object_that_was_not_compiled_again_is_found_out(
    compiled: Compiled, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(compiled[0], tmp_path / "tree"))
    tree = Tree.open(root)
    fit.apply(tree, fit.plan(root, layout(), 8, golden.MACHINE, changed=fit.before(tree)))
    old = sorted((root / "bpf").glob("*.o"))
    code, _, err = _verify(capfd, "--source", root, *old)
    assert (code, err.count("\n")) == (1, 1) and "1,048,576 pages, 2,097,152 were asked for" in err
    assert _verify(capfd, "--source", root, *_compile(root))[0] == 0


def test_the_declarations_read_are_what_the_compiler_makes(tmp_path: Path) -> None:
    """Sizes in every notation, in a macro with parentheses: libclang's reading against clang's BTF."""
    root = Path(shutil.copytree(golden.TREE, tmp_path / "tree"))
    sizes = ["1 << 3", "0x10", "2 + 2", "HEAP_GB", "4ull", "010", "(HEAP_GB)/2", "sizeof(long)"]
    text = "#include <ffkx_heap.bpf.h>\n#define HEAP_GB 64\n"
    for number, size in enumerate(sizes):
        text += f'ffkx_heap({size}, 0) heap{number} SEC(".maps");\n'
    for other in (root / "bpf").glob("*.bpf.c"):
        other.unlink()
    (root / "bpf/sizes.bpf.c").write_text(text)
    found = declarations.find(root, layout().heaps)
    heaps = verify.verify(_compile(root), verify.expected(found))
    assert [heap.gb for heap in heaps] == [8, 16, 4, 64, 4, 8, 32, 8]
    assert [item.gb for item in found.declarations] == [heap.gb for heap in heaps]


def test_what_is_no_object_of_the_tree_is_one_line(
    compiled: Compiled, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root, objects = compiled
    (tmp_path / "text.o").write_text("no object\n")
    (tmp_path / "empty.o").touch()
    (tmp_path / "other.bpf.o").write_bytes(objects[0].read_bytes())
    cut = tmp_path / objects[0].name
    cut.write_bytes(objects[0].read_bytes()[:-2000])
    for path in (
        tmp_path / "text.o",
        tmp_path / "empty.o",
        tmp_path / "other.bpf.o",
        tmp_path / "nothing.o",
        tmp_path,
        cut,
        Path("/bin/true"),
    ):
        code, out, err = _verify(capfd, "--source", root, path)
        assert (code, out, err.count("\n")) == (1, "", 1) and str(path) in err, err


def test_damage_is_an_error_of_ours_whatever_is_damaged(compiled: Compiled, tmp_path: Path) -> None:
    whole = compiled[1][0].read_bytes()
    path = tmp_path / "damaged.o"
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(KflexError):
            verify.verify([path])
    dice = random.Random(1)
    for _ in range(300):
        bytes_ = bytearray(whole)
        for _ in range(8):
            bytes_[dice.randrange(len(bytes_))] = dice.randrange(256)
        path.write_bytes(bytes_)
        try:
            verify.verify([path])
        except KflexError as error:
            assert "\n" not in str(error)


def test_verify_goes_with_nothing_that_changes_a_tree(capfd: pytest.CaptureFixture[str]) -> None:
    for wrong in ("--auto", "--revert", "--dry-run", "--keep-capacities"):
        assert _verify(capfd, wrong, "x.o")[0] == 2
    assert _verify(capfd)[0] == 2
