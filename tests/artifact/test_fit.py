"""fit-heap on a tree in the artifact's shape: what it writes, that it goes back, what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kflex_repro.cli import main
from kflex_repro.errors import KflexError
from kflex_repro.heap import capacities, fit, model
from kflex_repro.heap.declarations import Shape
from kflex_repro.heap.layout import RECIPE, Layout, layout
from kflex_repro.patching.tree import STATE_DIRECTORY, Tree
from tests.artifact import golden
from tests.artifact.golden import MACHINE
from tests.artifact.test_tree import snapshot
from tests.artifact.variants import HEADER, Variant, variants

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return Path(shutil.copytree(golden.TREE, tmp_path / "tree"))


@pytest.fixture
def run(root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """`kflex-repro fit-heap ...` on that tree, on a machine of known size: (exit code, output, errors)."""
    monkeypatch.setattr(model, "machine", lambda: MACHINE)

    def call(*arguments: str, source: Path = root) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(["fit-heap", "--source", str(source), *arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return call


# --- what is written --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gb", golden.SIZES)
def test_the_diff_is_the_expected_one_and_both_ways_are_exact(root: Path, gb: int) -> None:
    before = snapshot(root)
    tree = Tree.open(root)
    made = fit.plan(root, layout(), gb, MACHINE)
    assert fit.preview(tree, made).diff == golden.path(gb).read_text(), "see tests/artifact/golden.py"
    fit.apply(tree, made)
    fitted = snapshot(root)
    again = Tree.open(root)
    assert fit.apply(again, fit.plan(root, layout(), gb, MACHINE, changed=fit.before(again))).diff == ""
    assert snapshot(root) == fitted
    again.revert(RECIPE)
    assert snapshot(root) == before


def test_the_capacities_written_fit_and_more_would_not_be_much(root: Path) -> None:
    made = fit.plan(root, layout(), 4, MACHINE)
    for change in made.changes:
        if change.kind == "capacity":
            most = model.largest_objects(4, model.Allocator(cpus=MACHINE.cpus))
            assert most * 9 // 10 < change.after <= most
            assert change.after % 2 == 0


def test_another_size_starts_from_the_original(root: Path, run: Run) -> None:
    before = snapshot(root)
    assert run("--gb", "1")[0] == 0
    assert run("--gb", "8")[0] == 0
    eight = snapshot(root)
    assert run("--revert")[0] == 0
    assert snapshot(root) == before
    assert run("--gb", "8")[0] == 0
    assert snapshot(root) == eight
    assert run("--revert")[0] == 0
    assert snapshot(root) == before


def test_a_second_run_says_that_nothing_changes(root: Path, run: Run) -> None:
    assert "5 files changed" in run("--gb", "2")[1]
    fitted = snapshot(root)
    code, out, _ = run("--gb", "2")
    assert (code, out.splitlines()[-1]) == (0, "nothing to change: the heaps are 2 GB already")
    assert snapshot(root) == fitted


def test_a_dry_run_writes_nothing_at_all(root: Path, run: Run) -> None:
    before = snapshot(root)
    code, out, _ = run("--gb", "2", "--dry-run")
    assert code == 0 and "+ffkx_heap(2, 0) heap" in out
    assert snapshot(root) == before and not (root / STATE_DIRECTORY).exists()


def test_auto_takes_the_largest_size_that_the_machine_holds(run: Run) -> None:
    code, out, _ = run("--auto", "--json")
    assert code == 0 and json.loads(out)["gb"] == model.auto_gb(MACHINE)


def test_kept_capacities_stay_or_the_size_is_refused_with_one_that_holds_them(root: Path, run: Run) -> None:
    source = root / "src/Main.cpp"
    too_many = model.largest_objects(1, model.Allocator(cpus=MACHINE.cpus)) + 2
    small = source.read_bytes().replace(b"10'000'000", str(too_many).encode())
    source.write_bytes(small)
    code, _, err = run("--gb", "1", "--keep-capacities")
    assert (code, err.count("\n")) == (1, 1) and "nearest size that works is 2 GB" in err
    assert run("--gb", "2", "--keep-capacities")[0] == 0
    assert source.read_bytes() == small


def test_json_has_the_places_the_numbers_and_the_diff(run: Run) -> None:
    code, out, _ = run("--gb", "4", "--json")
    report = json.loads(out)
    assert code == 0 and report["changed"] and not report["dry_run"]
    assert {heap["name"]: (heap["before"], heap["after"]) for heap in report["heaps"]} == {
        "bench_data_structures.heap": (64, 4),
        "ffkx_memcache.heap": (128, 4),
        "ffkx_memcached.heap": (256, 4),
        "ffkx_redis.heap": (256, 4),
    }
    assert {item["name"] for item in report["capacities"]} >= {"kRedisHeapCapacity", "kMemcacheHeapCapacity"}
    assert report["diff"].startswith("--- a/bpf/")
    assert any("address-search" in line for line in report["warnings"])


def test_other_recipes_on_the_same_files_stay_when_the_heaps_go_back(root: Path, run: Run) -> None:
    for recipe in ("address-search", "out-of-heap"):
        assert main(["patch", "apply", recipe, "--source", str(root)]) == 0
    patched = snapshot(root)
    code, _, err = run("--gb", "4")
    assert code == 0 and "address-search" not in err
    assert run("--gb", "1")[0] == 0
    assert snapshot(root) != patched
    assert run("--revert")[0] == 0
    assert snapshot(root) == patched


def test_a_size_from_another_macro_is_written_at_the_use_and_said(root: Path, run: Run) -> None:
    source = root / "bpf/ffkx_redis.bpf.c"
    text = source.read_text().replace("ffkx_heap(256,", "ffkx_heap(HEAP_GB,")
    source.write_text("#define HEAP_GB 256\n" + text)
    code, out, _ = run("--gb", "4")
    assert code == 0 and "HEAP_GB itself stays as it is" in out
    assert "#define HEAP_GB 256\n" in source.read_text() and "ffkx_heap(4, 0)" in source.read_text()


def test_the_benchmarks_capacity_counts_all_size_classes(root: Path) -> None:
    (root / "bench").mkdir(exist_ok=True)
    (root / "bench/BenchDataStructures.cpp").write_text("int kBenchmarkSize = 1'00'000;\n")
    made = fit.plan(root, layout(), 2, MACHINE)
    (bench,) = [change for change in made.changes if change.name == "kBenchmarkSize"]
    shape = next(shape for shape in layout().capacities if shape.name == "kBenchmarkSize")
    allocator = shape.allocator(100_000, MACHINE.cpus)
    assert allocator.class_bytes == model.CLASS_BYTES
    assert bench.after == min(100_000, capacities.readable(model.largest_objects(2, allocator)))


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["0", "3", "-1", "0.5", "1e9", "four", "", "nan", "99999999999999999999"])
def test_a_bad_size_is_one_line_and_changes_nothing(root: Path, run: Run, size: str) -> None:
    before = snapshot(root)
    code, out, err = run("--gb", size)
    assert code != 0 and out == "" and err.count("\n") == 1 and "--gb" in err, err
    assert snapshot(root) == before


def test_more_than_the_ram_is_refused_with_the_nearest_size(run: Run) -> None:
    code, _, err = run("--gb", "256")
    assert (code, err.count("\n")) == (1, 1)
    assert "48 GiB of free RAM" in err and "nearest size that works is 32 GB" in err


def test_heaps_of_one_object_count_together_and_of_two_objects_do_not(root: Path, run: Run) -> None:
    assert run("--gb", "32", "--dry-run")[0] == 0
    source = root / "bpf/ffkx_redis.bpf.c"
    source.write_text(source.read_text() + '\nffkx_heap(32, 0) second SEC(".maps");\n')
    code, _, err = run("--gb", "32")
    assert (code, err.count("\n")) == (1, 1) and "ffkx_redis.heap + ffkx_redis.second" in err
    assert "nearest size that works is 16 GB" in err
    assert run("--gb", "16", "--dry-run")[0] == 0
    assert json.loads(run("--auto", "--json", "--dry-run")[1])["gb"] == 16


def test_no_tree_and_a_wrong_tree_are_one_line(tmp_path: Path, run: Run) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for place in ("nothing-here", "empty", "file"):
        code, _, err = run("--gb", "4", source=tmp_path / place)
        assert (code, err.count("\n")) == (1, 1) and place in err, err


def test_one_job_at_a_time(run: Run) -> None:
    for arguments in ((), ("--gb", "4", "--auto"), ("--gb", "4", "--revert"), ("--gb", "4", "an-object.o")):
        assert run(*arguments)[0] == 2


def test_nothing_to_revert_is_no_failure(run: Run) -> None:
    code, out, _ = run("--revert")
    assert (code, out) == (0, "nothing to revert: this tree was not fitted\n")


def test_a_dirty_git_tree_is_warned_of_and_fitted(root: Path, run: Run) -> None:
    git = ["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@example.invalid"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "all"], check=True)
    assert "uncommitted" not in run("--gb", "4", "--dry-run")[2]
    with (root / "README").open("a") as stream:
        stream.write("mine\n")
    code, _, err = run("--gb", "4")
    assert code == 0 and "uncommitted changes (README)" in err


def test_a_read_only_file_is_refused_before_anything_is_written(root: Path, run: Run) -> None:
    before = snapshot(root)
    (root / "src/Main.cpp").chmod(0o444)
    code, _, err = run("--gb", "4")
    assert (code, err.splitlines()[-1].startswith("kflex-repro: the file is read-only (src/Main.cpp)")) == (
        1,
        True,
    )
    (root / "src/Main.cpp").chmod(before["src/Main.cpp"][1])
    assert snapshot(root) == before


def test_a_size_edited_by_hand_after_the_fit_is_named_and_kept(root: Path, run: Run) -> None:
    run("--gb", "4")
    source = root / "bpf/ffkx_redis.bpf.c"
    source.write_text(source.read_text().replace("ffkx_heap(4,", "ffkx_heap(16,"))
    edited = snapshot(root)
    for arguments in (("--gb", "2"), ("--revert",)):
        code, _, err = run(*arguments)
        assert (code, err.count("\n")) == (1, 1) and "bpf/ffkx_redis.bpf.c:6" in err
    assert snapshot(root) == edited


def test_edits_elsewhere_survive_a_new_fit_and_the_revert(root: Path, run: Run) -> None:
    before = (root / "bpf/ffkx_redis.bpf.c").read_bytes()
    run("--gb", "4")
    source = root / "bpf/ffkx_redis.bpf.c"
    source.write_bytes(b"// mine\r\n" + source.read_bytes() + b"// and \xe9\n")
    assert run("--gb", "2")[0] == 0
    assert b"ffkx_heap(2, 0)" in source.read_bytes()
    assert run("--revert")[0] == 0
    assert source.read_bytes() == b"// mine\r\n" + before + b"// and \xe9\n"


def test_crlf_a_mark_and_bytes_that_are_no_utf8_stay(root: Path, run: Run) -> None:
    source = root / "src/Main.cpp"
    strange = b"\xef\xbb\xbf// \xe9\xff\r\n" + source.read_bytes().replace(b"\n", b"\r\n")
    source.write_bytes(strange)
    code, _, err = run("--gb", "4")
    assert code == 0, err
    changed = source.read_bytes()
    assert changed.count(b"\r\n") == strange.count(b"\r\n") and changed.startswith(strange[:10])
    assert b"10'000'000" not in changed
    run("--revert")
    assert source.read_bytes() == strange


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("constexpr int kRedisHeapCapacity = 10'000'000;", "", "is set 0 times"),
        ("constexpr int kRedisHeapCapacity = 10'000'000;", "int kRedisHeapCapacity = rand();", "no constant"),
        (
            "namespace {",
            "namespace other { const int kRedisHeapCapacity = 5; }\nnamespace {",
            "is set 2 times",
        ),
    ],
)
def test_a_capacity_that_cannot_be_read_is_refused_or_kept_with_a_warning(
    root: Path, run: Run, old: str, new: str, said: str
) -> None:
    source = root / "src/Main.cpp"
    source.write_text(source.read_text().replace(old, new, 1))
    code, _, err = run("--gb", "4")
    assert (code, err.count("\n")) == (1, 1) and said in err and "src/Main.cpp" in err
    source.write_text(source.read_text().replace("10'000'000", "1'000"))
    code, _, err = run("--gb", "4", "--keep-capacities")
    assert code == 0 and said in err


@pytest.mark.parametrize(
    ("text", "value", "written"),
    [
        ("int kHere = 10'000'000;", 10_000_000, "1'000'000"),
        ("constexpr long kHere{10000000};", 10_000_000, "1000000"),
        ("static const unsigned kHere = 0x1000u;", 4096, "1000000u"),
        ("const int kHere = 10 * 1000 * 1000;", 10_000_000, "1000000"),
        ("#define kHere 5000 // each", 5000, "1000000"),
        ("namespace a { namespace { constexpr auto kHere = 2'000UL; } }", 2000, "1'000'000UL"),
        ("constexpr int kMore = 7, kHere = 2 * kMore;", 14, "1000000"),
    ],
)
def test_a_capacity_is_read_however_it_is_written(
    tmp_path: Path, text: str, value: int, written: str
) -> None:
    source = '#include <absl/strings/str_cat.h>\nABSL_FLAG(bool, on, false, "kHere = 3");\n' + text + "\n"
    (tmp_path / "a.cpp").write_text(source)
    shape = capacities.CapacityShape("kHere", "a.cpp", "x.bpf.c")
    found = capacities.find(tmp_path, shape)
    assert found.value == value
    new = capacities.written(1_000_000, found.text)
    assert new == written
    (tmp_path / "a.cpp").write_text(source[: found.start] + new + source[found.end :])
    assert capacities.find(tmp_path, shape).value == 1_000_000


@given(st.integers(0, 10**12))
def test_readable_numbers_are_even_not_larger_and_not_much_smaller(objects: int) -> None:
    short = capacities.readable(objects)
    assert short <= objects and short % 2 == 0 and short >= objects * 0.8 - 1
    assert len(str(short).rstrip("0")) <= 2


def test_a_macro_that_counts_something_else_is_refused(root: Path) -> None:
    header = root / "bpf/include/ffkx_heap.bpf.h"
    header.write_text(header.read_text().replace("262144", "256"))
    with pytest.raises(KflexError, match=r"1,024 pages, not of 1,048,576"):
        fit.plan(root, layout(), 4, MACHINE)


# --- every way to write a declaration ---------------------------------------------------------------------


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(variant=variants(), gb=st.sampled_from(golden.SIZES))
def test_every_variant_is_fitted_left_alone_the_second_time_and_goes_back(
    tmp_path_factory: pytest.TempPathFactory, variant: Variant, gb: int
) -> None:
    root = tmp_path_factory.getbasetemp() / "variants"
    # A failed example may have left its state.
    shutil.rmtree(root, ignore_errors=True)
    source, shape = root / "bpf/v.bpf.c", Layout(Shape(include=("bpf",)))
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_bytes(variant.source())

    def planned(data: bytes) -> fit.Plan:
        changed = {"bpf/ffkx_heap.bpf.h": variant.header, "bpf/v.bpf.c": data}
        return fit.plan(root, shape, gb, golden.LARGE, changed=changed)

    made = planned(variant.source())
    assert [(change.was.replace("\r", ""), change.before) for change in made.changes] == variant.sizes
    fitted = fit.replaced(variant.source(), made.edits)
    assert fitted == variant.source(gb)
    assert planned(fitted).edits == []
    tree = Tree.open(root)
    fit.apply(tree, made)
    assert source.read_bytes() == fitted
    if tree.get(RECIPE):
        tree.revert(RECIPE)
    assert source.read_bytes() == variant.source()


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(variant=variants(), sizes=st.lists(st.sampled_from(golden.SIZES), min_size=1, max_size=3))
def test_every_variant_goes_back_over_several_sizes(
    tmp_path_factory: pytest.TempPathFactory, variant: Variant, sizes: list[int]
) -> None:
    root = tmp_path_factory.mktemp("variant")
    (root / "bpf").mkdir()
    (root / "bpf/ffkx_heap.bpf.h").write_bytes(variant.header)
    (root / "bpf/v.bpf.c").write_bytes(variant.source())
    shape, tree = Layout(Shape(include=("bpf",))), Tree.open(root)
    for gb in sizes:
        fit.apply(tree, fit.plan(root, shape, gb, golden.LARGE, changed=fit.before(tree)))
        assert (root / "bpf/v.bpf.c").read_bytes() == variant.source(gb)
    if tree.get(RECIPE):
        tree.revert(RECIPE)
    assert (root / "bpf/v.bpf.c").read_bytes() == variant.source()
    assert HEADER.splitlines()[0].encode() in (root / "bpf/ffkx_heap.bpf.h").read_bytes()
