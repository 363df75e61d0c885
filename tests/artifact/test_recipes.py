"""Recipes over the tree in the artifact's shape: each takes, works compiled, and goes without a trace."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kflex_repro.errors import KflexError
from kflex_repro.patching import apply, recipe
from kflex_repro.patching.cli import group
from kflex_repro.patching.tree import STATE_DIRECTORY, Tree
from tests.artifact.test_tree import Snapshot, snapshot

SHAPE = Path(__file__).parent / "tree"
OURS = ("address-search", "cgroup2-path", "out-of-heap")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    place = tmp_path / "tree"
    shutil.copytree(SHAPE, place)
    return place


def take(root: Path, *names: str) -> None:
    for name in names:
        tree = Tree.open(root)
        assert apply.apply(apply.plan(recipe.load(name), tree), tree)


def state(root: Path, name: str) -> apply.Status:
    return apply.status(recipe.load(name), Tree.open(root))


@pytest.mark.parametrize("name", OURS)
def test_a_recipe_takes_once_and_goes_without_a_trace(root: Path, name: str) -> None:
    before = snapshot(root)
    assert state(root, name).state == "applicable"
    take(root, name)
    after = snapshot(root)
    assert after != before
    assert state(root, name).state == "applied"

    tree = Tree.open(root)
    again = apply.plan(recipe.load(name), tree)
    assert again.diff == "" and not apply.apply(again, tree)
    assert snapshot(root) == after

    Tree.open(root).revert(name)
    assert snapshot(root) == before
    assert state(root, name).state == "applicable"


@pytest.mark.parametrize("order", [OURS, OURS[::-1]])
def test_recipes_of_the_same_files_go_in_any_order(root: Path, order: tuple[str, ...]) -> None:
    before = snapshot(root)
    take(root, *OURS)
    for name in order:
        Tree.open(root).revert(name)
        assert state(root, name).state == "applicable"
    assert snapshot(root) == before


def test_the_patched_tree_has_crlf_where_the_tree_had(root: Path) -> None:
    for path in (p for p in root.rglob("*") if p.suffix in {".c", ".cpp", ".hpp"}):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + b"// \xff\xfe no UTF-8\r\n")
    before = snapshot(root)
    take(root, *OURS)
    for name in ("src/Main.cpp", "src/BPFHeapAllocator.cpp", "libbpf/src/libbpf.c"):
        data = (root / name).read_bytes()
        assert data.count(b"\r\n") == data.count(b"\n")
        assert b"kflex_" in data and data.endswith(b"// \xff\xfe no UTF-8\r\n")
    for name in OURS:
        Tree.open(root).revert(name)
    assert snapshot(root) == before


# -- compiled


def compiled(root: Path, program: str) -> Path:
    """The libbpf of a tree with a program that uses it."""
    (root / "program.c").write_text(program)
    out = root / "program"
    command = ["gcc", "-Wall", "-Wextra", "-Werror", "-Wno-sign-compare", f"-I{root}/libbpf/src", "-o", out]
    subprocess.run([*command, root / "program.c", root / "libbpf/src/libbpf.c"], check=True)
    return out


SEARCH = """
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#include "libbpf.h"

int main(int argc, char **argv)
{
	struct bpf_map map = { .name = "heap", .type = BPF_MAP_TYPE_HEAP };
	struct bpf_object object = { .maps = &map, .nr_maps = 1 };
	long gb = argc > 1 ? atol(argv[1]) : 1;

	map.max_entries = gb * 262144;
	map.fd = memfd_create("heap", 0);
	if (map.fd < 0 || ftruncate(map.fd, gb << 30))
		return 2;
	if (bpf_object__load(&object))
		return 1;
	printf("%lx", (unsigned long)bpf_map__heap_address(&map));
	return 0;
}
"""


def found(program: Path, gb: int) -> int | None:
    out = subprocess.run([program, str(gb)], capture_output=True, text=True, check=False)
    assert out.returncode in (0, 1), out
    return int(out.stdout, 16) if out.returncode == 0 else None


def test_with_the_address_search_every_size_gets_an_aligned_address(root: Path) -> None:
    old = compiled(root, SEARCH)
    old = old.rename(old.with_name("old"))
    take(root, "address-search")
    new = compiled(root, SEARCH)
    for gb in (1, 4, 64, 128, 512):
        address = found(new, gb)
        assert address and address % (gb << 30) == 0, f"{gb} GB"
    if "la57" not in Path("/proc/cpuinfo").read_text():
        # 4-level paging: all 1,024 tries of the old search lie above the end of user space.
        assert found(old, 4) is None


def program(root: Path) -> Path:
    out = root / "ffkx"
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{root}/include"]
    sources = [root / "src/Main.cpp", root / "src/BPFHeapAllocator.cpp"]
    subprocess.run(["g++", *flags, "-o", out, *sources], check=True)
    return out


def test_a_full_heap_is_said_in_words(root: Path) -> None:
    too_small = ["--kredis", str(8 << 20)]
    aborted = subprocess.run([program(root), *too_small], capture_output=True, text=True, check=False)
    assert aborted.returncode < 0, "the tree does not abort: nothing to mend"

    take(root, *OURS)
    said = subprocess.run([program(root), *too_small], capture_output=True, text=True, check=False)
    assert said.returncode == 1
    assert re.fullmatch(r"ffkx: out of heap: no room for \d+ bytes more: .*fit-heap.*\n", said.stderr)


def test_cgroup_v2_is_opened_where_it_is_mounted(root: Path, tmp_path: Path) -> None:
    """The header alone, over mount tables of ours: the table's path is the only thing exchanged."""
    take(root, "cgroup2-path")
    header = (root / "include/kflex_cgroup2.hpp").read_text()
    table = tmp_path / "mounts"
    assert header.count("/proc/self/mounts") == 1
    source = header.replace("/proc/self/mounts", str(table))
    source += "\nint main() { std::puts(kflex_cgroup2()); }\n"
    binary = tmp_path / "where"
    subprocess.run(["g++", "-std=c++20", "-xc++", "-o", binary, "-"], input=source, text=True, check=True)

    def where() -> str:
        return subprocess.run([binary], capture_output=True, text=True, check=True).stdout.strip()

    table.write_text("tmpfs /sys/fs/cgroup tmpfs ro 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n")
    assert where() == "/sys/fs/cgroup/unified"
    table.write_text("none /mnt/my\\040groups cgroup2 rw 0 0\n")
    assert where() == "/mnt/my groups"
    table.write_text("cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n")
    assert where() == "/sys/fs/cgroup"
    table.unlink()
    assert where() == "/sys/fs/cgroup"


# -- anchors that do not fit


SPOILED = [
    (
        "address-search",
        "libbpf/src/libbpf.c",
        "1UL << 48",
        "1UL << 47",
        r"is not 1UL << 48 \(.*libbpf.c:\d+\)",
    ),
    (
        "address-search",
        "libbpf/src/libbpf.c",
        "roundup(1UL",
        "alignup(1UL",
        "use of macro roundup .*: not found",
    ),
    (
        "address-search",
        "libbpf/src/libbpf.c",
        "bpf_object__create_maps",
        "create_maps",
        "function .*: not found",
    ),
    ("cgroup2-path", "src/Main.cpp", "MemcacheAttach", "CacheAttach", "function MemcacheAttach: not found"),
    ("cgroup2-path", "src/Main.cpp", '"/sys/fs/cgroup"', "path()", r'step 3: string "/sys/fs/cgroup"'),
    ("out-of-heap", "src/Main.cpp", "skel.keys = ", "skel.keys = skel.keys ? nullptr : ", ""),
    (
        "out-of-heap",
        "src/Main.cpp",
        "skel.keys = ma->Allocate<void>(512).value();\n",
        "",
        "4 times, 5 expected",
    ),
    (
        "out-of-heap",
        "src/BPFHeapAllocator.cpp",
        "(size).value()",
        "(size)",
        "call of value on a call of Reserve",
    ),
    ("out-of-heap", "src/Main.cpp", "#include <BPFHeapAllocator.hpp>\n", "", "#include of .*: not found"),
]


@pytest.mark.parametrize(("name", "path", "old", "new", "message"), SPOILED)
def test_an_anchor_that_does_not_fit_is_named_and_nothing_changes(
    root: Path, name: str, path: str, old: str, new: str, message: str
) -> None:
    text = (root / path).read_text()
    assert old in text
    (root / path).write_text(text.replace(old, new))
    before = snapshot(root)
    tree = Tree.open(root)
    if not message:
        # Another expression around it is no other anchor.
        apply.apply(apply.plan(recipe.load(name), tree), tree)
        assert apply.failures(recipe.load(name), tree) == []
        return
    with pytest.raises(KflexError, match=message) as caught:
        apply.plan(recipe.load(name), tree)
    assert name in str(caught.value)
    assert snapshot(root) == before and not (root / STATE_DIRECTORY).exists()
    assert state(root, name).state == "not applicable"


def test_what_is_no_code_is_no_anchor(root: Path) -> None:
    """A copy of the place in a comment or in code that is not compiled makes it no less unique."""
    path = root / "libbpf/src/libbpf.c"
    decoy = "static int\nbpf_object__create_maps(struct bpf_object *obj)\n{ return roundup(1UL << 48, 1); }\n"
    path.write_text(path.read_text() + f"\n/* {decoy}*/\n#if 0\n{decoy}#endif\n// {decoy.splitlines()[2]}\n")
    take(root, "address-search")
    assert path.read_text().count("roundup(kflex_task_size(), size)") == 1
    assert path.read_text().count("1UL << 48") == 3


def test_a_recipe_applied_by_hand_is_present(root: Path) -> None:
    take(root, "cgroup2-path")
    shutil.rmtree(root / STATE_DIRECTORY)
    assert state(root, "cgroup2-path").state == "present"


def test_a_place_edited_since_is_told(root: Path) -> None:
    take(root, "cgroup2-path")
    main = root / "src/Main.cpp"
    main.write_text(main.read_text().replace("open(kflex_cgroup2()", 'open("/my/cgroup"', 1))
    told = state(root, "cgroup2-path")
    assert told.state == "edited" and re.match(r"src/Main.cpp:\d+", told.detail)
    with pytest.raises(KflexError, match=r"edited since cgroup2-path was applied \(src/Main.cpp:\d+\)"):
        Tree.open(root).revert("cgroup2-path")


# -- step kinds, one by one


@pytest.fixture
def kitchen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A recipe directory of our own beside a tree of one file."""
    recipes = tmp_path / "checkout"
    (recipes / "patches").mkdir(parents=True)
    (recipes / "bpf").mkdir()
    monkeypatch.setenv("KFLEX_SOURCE", str(recipes))
    place = tmp_path / "one"
    place.mkdir()
    (place / "a.cpp").write_text(FILE)
    yield place


FILE = """\
#include <first.h>
#include "second.h"
#define LIMIT (4 * 1024)
#define TWICE(x, y) ((x) + (y))

static const int retries = 3;
std::string named{"x"};

// Says how many.
unknown::Type Box::count(int n) const {
  use(n, "text");
  return first(n)->second<int, long>(n + 1, f(2, 3)).value();
}

int other(int n)
{
#ifdef NEVER
  use(n, "text");
#endif
  return TWICE(n, LIMIT) + ns::use(0) + ::use();
}
"""


def cook(place: Path, step: str, more: str = "", given: dict[str, object] | None = None) -> str:
    """Apply a recipe of one step and return the diff's changed lines."""
    head = "version='1'\ntitle='t'\nwhy='w'\ntarget='x'\n"
    text = f"{head}{more}\n[[step]]\nfile='a.cpp'\n{step}"
    (recipe.directory() / "r.toml").write_text(text)
    tree = Tree.open(place)
    made = apply.plan(recipe.load("r"), tree, given)
    apply.apply(made, tree)
    assert apply.plan(recipe.load("r"), Tree.open(place), given).diff == ""
    after = (place / "a.cpp").read_text()
    Tree.open(place).revert("r")
    assert (place / "a.cpp").read_text() == FILE
    changed = [line for line in made.diff.splitlines() if re.match(r"[-+](?![-+])", line)]
    assert all(line[1:] in after.splitlines() for line in changed if line[0] == "+")
    return "\n".join(changed)


STEPS = {
    "a call with all it has": (
        "kind='call'\nfunction='count'\nname='use'\nnew='log($call, $callee, $arg1, $arguments)'",
        '-  use(n, "text");\n+  log(use(n, "text"), use, "text", n, "text");',
    ),
    "an argument of a call": (
        "kind='call'\nname='use'\nfunction='count'\nargument=0\nwas='n'\nnew='n * 2'",
        '-  use(n, "text");\n+  use(n * 2, "text");',
    ),
    "a method on a call": (
        "kind='call'\nname='value'\nof='second'\nnew='safe($receiver)'",
        "-  return first(n)->second<int, long>(n + 1, f(2, 3)).value();\n"
        "+  return safe(first(n)->second<int, long>(n + 1, f(2, 3)));",
    ),
    "qualified calls, several": (
        "kind='call'\nname='use'\nfunction='other'\ncount=2\nnew='used($arguments)'",
        "-  return TWICE(n, LIMIT) + ns::use(0) + ::use();\n+  return TWICE(n, LIMIT) + used(0) + used();",
    ),
    "an argument of a macro": (
        "kind='macro-argument'\nname='TWICE'\nargument=1\nwas='LIMIT'\nnew='7'",
        "-  return TWICE(n, LIMIT) + ns::use(0) + ::use();\n+  return TWICE(n, 7) + ns::use(0) + ::use();",
    ),
    "a string": (
        "kind='string-literal'\nname='text'\nnew='say($was)'",
        '-  use(n, "text");\n+  use(n, say("text"));',
    ),
    "a variable": (
        "kind='initializer'\nname='retries'\nwas='3'\nnew='$was + 1'",
        "-static const int retries = 3;\n+static const int retries = 3 + 1;",
    ),
    "a define": (
        "kind='initializer'\nname='LIMIT'\nwas='(4  * 1024)'\nnew='8192'",
        "-#define LIMIT (4 * 1024)\n+#define LIMIT 8192",
    ),
    "before a function and its comment": (
        "kind='function'\nname='count'\nwhere='before'\nnew='int more;\n\n'".replace(
            "'int", "'''int"
        ).replace("\n\n'", "\n'''"),
        "+int more;",
    ),
    "at the entry of a function": (
        "kind='function'\nname='other'\nwhere='entry'\nnew='  n++;'",
        "+  n++;",
    ),
    "behind a function": ("kind='function'\nname='count'\nwhere='after'\nnew='int more;'", "+int more;"),
    "behind an include": ("kind='include'\nname='second.h'\nnew='<third.h>'", "+#include <third.h>"),
    "before all includes": ("kind='include'\nnew='\"zero.h\"'", '+#include "zero.h"'),
    "text as the last resort": (
        "kind='text'\nname='4 * 1024'\ncount=1\nnew='4096'",
        "-#define LIMIT (4 * 1024)\n+#define LIMIT (4096)",
    ),
}


@pytest.mark.parametrize("what", STEPS)
def test_each_kind_of_step_changes_its_place_only(kitchen: Path, what: str) -> None:
    step, expected = STEPS[what]
    assert cook(kitchen, step) == expected


@pytest.mark.parametrize("what", STEPS)
def test_line_ends_and_bytes_that_are_no_utf8_come_through(kitchen: Path, what: str) -> None:
    """A call over two lines with such bytes in it, too: what is quoted in the new text is what was there."""

    def result(content: bytes) -> bytes:
        (kitchen / "a.cpp").write_bytes(content)
        tree = Tree.open(kitchen)
        apply.apply(apply.plan(recipe.load("r"), tree), tree)
        after = (kitchen / "a.cpp").read_bytes()
        Tree.open(kitchen).revert("r")
        assert (kitchen / "a.cpp").read_bytes() == content
        return after

    cook(kitchen, STEPS[what][0])
    plain = FILE.encode().replace(b'use(n, "text")', b'use(n,\n      "text" /* \xff\xfe */)')
    plain = plain.replace(b"(n + 1, f(2, 3))", b"(n + 1, /* \xfc */\n      f(2, 3))")
    unix, dos = result(plain), result(plain.replace(b"\n", b"\r\n"))
    assert unix != plain
    assert dos == unix.replace(b"\n", b"\r\n")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    what=st.sampled_from(sorted(STEPS)),
    at=st.integers(0, len(FILE)),
    length=st.integers(0, 40),
    noise=st.one_of(
        st.binary(max_size=8), st.sampled_from([b"(", b")", b"{", b"}", b'"', b"/*", b"#if 0\n", b"<"])
    ),
)
def test_a_damaged_file_is_patched_back_and_forth_or_refused(
    kitchen: Path, what: str, at: int, length: int, noise: bytes
) -> None:
    (kitchen / "a.cpp").write_text(FILE)
    cook(kitchen, STEPS[what][0])
    content = FILE.encode()
    content = content[:at] + noise + content[at + length :]
    (kitchen / "a.cpp").write_bytes(content)
    tree = Tree.open(kitchen)
    try:
        apply.apply(apply.plan(recipe.load("r"), tree), tree)
    except KflexError:
        assert (kitchen / "a.cpp").read_bytes() == content
        return
    assert apply.plan(recipe.load("r"), Tree.open(kitchen)).diff == ""
    Tree.open(kitchen).revert("r")
    assert (kitchen / "a.cpp").read_bytes() == content


def test_a_parameter_is_filled_in_and_checked(kitchen: Path) -> None:
    step = "kind='initializer'\nname='retries'\nnew='$tries'"
    more = "[parameter.tries]\ntype='integer'\nhelp='how often'\nleast=1\nmost=9\n"
    assert cook(kitchen, step, more, {"tries": "7"}).endswith("retries = 7;")
    for bad in ("0", "10", "x", "1.5", ""):
        with pytest.raises(KflexError, match="how often"):
            cook(kitchen, step, more, {"tries": bad})
    with pytest.raises(KflexError, match="r needs tries"):
        cook(kitchen, step, more)
    with pytest.raises(KflexError, match="r has no parameter gb"):
        cook(kitchen, step, more, {"tries": 7, "gb": 4})
    text = "[parameter.tries]\ntype='string'\nhelp='a path'\n"
    with pytest.raises(KflexError, match="not a plain string"):
        cook(kitchen, step, text, {"tries": '"; system("x'})


BAD_RECIPES = [
    ("kind='call'\nname='use'\nnew='x'\ncolour='red'", "unknown key colour"),
    ("kind='paint'\nname='use'\nnew='x'", "unknown kind paint"),
    ("kind='call'\nname='use'", "call needs new"),
    ("kind='text'\nname='x'\nnew='y'", "text needs count"),
    ("kind='include'\nnew='<x>'\nargument=1", "include has no argument"),
    ("kind='call'\nname='use'\nnew='x'\ncount='all'", "count must be int"),
    ("kind='call'\nname='use'\nnew='x'\ncount=true", "count must be int"),
    ("kind='function'\nname='use'\nnew='x'\nwhere='under'", "where is one of"),
    ("kind='new-file'\nnew='x'\nsource='y'", "either new or source"),
    ("kind='new-file'\nsource='../../etc/passwd'", "no path inside"),
    ("kind='call'\nname='use'\nnew='$nothing'\nfunction='count'", r"\$nothing is not known"),
    ("kind='call'\nname='use'\nnew='a $ b'\nfunction='count'", r"a lone \$"),
    ("kind='call'\nname='use'\nnew='x'\nargument=5\nfunction='count'", "has no argument 5"),
    ("kind='call'\nname='use'\nnew='x'", "3 times, 1 expected"),
    (
        "kind='call'\nname='use'\nnew='x'\nfunction='count'\n[[check]]\nwhat='call'\nname='gone'",
        "file is missing",
    ),
    (
        "kind='call'\nname='use'\nnew='x()'\nfunction='count'\n[[check]]\nwhat='call'\nname='y'\nfile='a.cpp'",
        "r would not take: call y: 0 in a.cpp, 1 expected",
    ),
    ("kind=", "not a recipe"),
]


@pytest.mark.parametrize(("step", "message"), BAD_RECIPES)
def test_a_recipe_that_is_wrong_is_one_line_and_changes_nothing(
    kitchen: Path, step: str, message: str
) -> None:
    before: Snapshot = snapshot(kitchen)
    with pytest.raises(KflexError, match=message) as caught:
        cook(kitchen, step)
    assert "\n" not in str(caught.value)
    assert snapshot(kitchen) == before


# -- the command


def run(*arguments: object) -> Result:
    return CliRunner().invoke(group, [str(argument) for argument in arguments])


def test_the_recipes_that_ship_are_sound() -> None:
    listed = json.loads(run("list", "--json").stdout)["recipes"]
    assert {item["id"] for item in listed} >= {*OURS, "heap-size"}
    for item in listed:
        shown = run("show", item["id"])
        assert shown.exit_code == 0 and item["title"] in shown.stdout


def test_the_command_applies_tells_and_reverts(root: Path) -> None:
    before = snapshot(root)
    dry = run("apply", *OURS, "--source", root, "--dry-run")
    assert dry.exit_code == 0 and "+#include <kflex_cgroup2.hpp>" in dry.stdout
    assert snapshot(root) == before

    made = json.loads(run("apply", *OURS, "--source", root, "--json").stdout)
    assert [item["changed"] for item in made["recipes"]] == [True, True, True]
    again = json.loads(run("apply", *OURS, "--source", root, "--json").stdout)
    assert [item["changed"] for item in again["recipes"]] == [False, False, False]
    told = json.loads(run("status", "--source", root, "--json").stdout)
    assert {r["id"]: r["state"] for r in told["recipes"] if r["id"] in OURS} == dict.fromkeys(OURS, "applied")

    assert run("revert", "--all", "--source", root, "--dry-run").exit_code == 0
    assert snapshot(root) != before
    assert run("revert", "--all", "--source", root).exit_code == 0
    assert snapshot(root) == before


def test_one_anchor_that_is_missing_stops_all_recipes_of_a_command(root: Path) -> None:
    (root / "libbpf/src/libbpf.c").unlink()
    before = snapshot(root)
    stopped = run("apply", "out-of-heap", "address-search", "--source", root)
    assert isinstance(stopped.exception, KflexError)
    assert snapshot(root) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("apply", "nope", "--source", "{root}"), "there is no recipe nope"),
        (("apply", "../heap-size", "--source", "{root}"), "there is no recipe"),
        (("apply", "heap-size", "--source", "{root}"), "kflex-repro fit-heap"),
        (("apply", "address-search", "--source", "{root}/bpf"), "no file libbpf/src/libbpf.c"),
        (("apply", "address-search", "--source", "{root}/nope"), "no such directory"),
        (("apply", "address-search", "--source", "{root}", "--set", "gb=1"), "has no parameter gb"),
        (("revert", "address-search", "--source", "{root}"), "not applied"),
    ],
)
def test_what_cannot_be_done_is_one_line(root: Path, arguments: tuple[str, ...], message: str) -> None:
    failed = run(*(argument.format(root=root) for argument in arguments))
    assert isinstance(failed.exception, KflexError)
    assert message in str(failed.exception)
    assert not (root / STATE_DIRECTORY).exists()
