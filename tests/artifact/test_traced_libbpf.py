"""The traced libbpf, built from the distribution's source: under real programs, real maps, real failures."""

from __future__ import annotations

import ctypes
import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kflex_repro.build import libbpf, toolchain
from kflex_repro.build.cli import build
from kflex_repro.errors import KflexError, Unavailable
from kflex_repro.heap import search
from kflex_repro.patching import apply, recipe
from kflex_repro.patching.tree import Tree
from tests.bpf.conftest import Compile, compile_bpf
from tests.conftest import require, unavailable

__all__ = ["compile_bpf"]

pytestmark = pytest.mark.bpf

HERE = Path(__file__).parent
GIB = 1 << 30
ARRAY, LRU_HASH, ARENA, MMAPABLE = 2, 9, 33, 1024
MAP_SHARED, MAP_FIXED, MAP_ANONYMOUS, MAP_FIXED_NOREPLACE = 0x01, 0x10, 0x20, 0x100000

MAPS = r"""
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(map_flags, BPF_F_MMAPABLE); __uint(max_entries, 10);
         __type(key, __u32); __type(value, __u8[4095]); } table SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 4); __type(key, __u32); __type(value, __u64); }
    a_map_whose_name_the_kernel_cuts SEC(".maps");
#ifdef ARENA
struct { __uint(type, 33); __uint(map_flags, BPF_F_MMAPABLE); __uint(max_entries, 100); } arena SEC(".maps");
#endif
__u64 counter = 5;
const volatile __u32 limit = 7;

SEC("xdp")
int count(struct xdp_md *context)
{
    return counter++ < limit ? XDP_PASS : XDP_DROP;
}
char LICENSE[] SEC("license") = "GPL";
"""

Traced = Callable[..., tuple[str, list[dict[str, Any]]]]
Searching = Callable[[int], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def library() -> Path:
    """The traced library; in the user's cache, where it is built once."""
    require("root")
    try:
        place, _ = libbpf.traced(toolchain.Runner())
    except Unavailable as error:
        unavailable(str(error))
    return place / "lib" / "libbpf.so.1"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """libbpf_driver.c, linked with the distribution's libbpf and knowing of no other."""
    made = tmp_path_factory.mktemp("program") / "maps"
    command = [toolchain.cc().path, "-O2", "-Wall", "-Wextra", "-Werror", HERE / "libbpf_driver.c"]
    subprocess.run([*command, "-o", made, "-lbpf"], check=True)
    return made


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("ascii").splitlines()]


@pytest.fixture
def traced(library: Path, program: Path, tmp_path: Path) -> Traced:
    """traced(argument, …): what the program printed, and its trace without libbpf's own probes."""

    def run(*arguments: str | Path, wrapper: tuple[str, ...] = ()) -> tuple[str, list[dict[str, Any]]]:
        trace = tmp_path / "trace"
        trace.unlink(missing_ok=True)
        environment = {**os.environ, "KFLEX_TRACE": str(trace), "LD_LIBRARY_PATH": str(library.parent)}
        command = [*wrapper, program, *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        found = events(trace)
        assert found[0]["event"] == "start" and found[0]["program"] == str(program)
        version = libbpf.system_version(str(library))
        assert version and found[0]["libbpf"] == ".".join(map(str, version))
        return done.stdout, [event for event in found[1:] if not event.get("name", "").startswith("libbpf_")]

    return run


@pytest.fixture
def maps(compile_bpf: Compile) -> Path:
    return compile_bpf("maps", MAPS)


def test_the_library_is_libbpf(library: Path) -> None:
    version = libbpf.system_version(str(library))
    assert version is not None and version >= (1, 4)
    # Nothing of ours is visible to programs.
    assert not hasattr(ctypes.CDLL(str(library)), "kflex_trace_state")
    assert libbpf.traced(toolchain.Runner()) == (library.parent.parent, False)
    # What activate() picks where the system has no libbpf is the plain one.
    assert libbpf.newest_built() != library.parent.parent


def test_the_command_says_where_it_is(library: Path) -> None:
    done = CliRunner().invoke(build, ["--libbpf-traced", "--json"])
    assert json.loads(done.stdout)["library"] == str(library)
    assert CliRunner().invoke(build, ["--libbpf-traced", "--only", "vmlinux.h"]).exit_code == 2


def test_an_objects_maps(traced: Traced, maps: Path) -> None:
    out, found = traced("load", maps)
    printed = dict(line.split() for line in out.splitlines()[1:])
    assert out.startswith("loaded\n")
    created = {event["name"]: event for event in found if event["event"] == "map_create"}
    # libbpf makes a map a second time, without BTF, where the kernel refuses the first.
    table = created["table"]
    assert (table["type"], table["type_name"], table["max_entries"]) == (ARRAY, "array", 10)
    assert (table["value_size"], table["flags"], table["bytes"], table["errno"]) == (4095, MMAPABLE, 40960, 0)
    hash_ = created["a_map_whose_name_the_kernel_cuts"]
    assert (hash_["type_name"], hash_["bytes"], hash_["errno"]) == ("hash", 64, 0) and hash_["fd"] >= 0

    data = [event for event in found if event["event"] == "mmap" and event["map"] == "maps.data"]
    image, memory = data
    # First an image of the data, then the map's memory in its place.
    assert (image["fd"], image["flags"], image["hint"]) == (-1, MAP_SHARED | MAP_ANONYMOUS, "0x0")
    assert memory["fd"] >= 0 and memory["flags"] == MAP_SHARED | MAP_FIXED
    assert memory["hint"] == memory["address"] == image["address"] == printed["maps.data"]
    rodata = [event for event in found if event.get("map") == "maps.rodata"]
    assert [event["prot"] for event in rodata] == [3, 1]
    assert all(event["errno"] == 0 and event["try"] == 1 for event in (*data, *rodata))


def test_arenas(traced: Traced, compile_bpf: Compile) -> None:
    require("arena")
    maps = compile_bpf("arenas", "#define ARENA\n" + MAPS)
    out, found = traced("load", maps)
    made = next(event for event in found if event.get("name") == "arena")
    placed = next(event for event in found if event.get("map") == "arena")
    assert (made["type"], made["type_name"], made["bytes"], made["errno"]) == (ARENA, "arena", 409600, 0)
    assert (placed["hint"], placed["length"], placed["flags"]) == ("0x0", 409600, MAP_SHARED)
    assert f"arena {placed['address']}\n" in out

    wanted = hex(1 << 44)
    out, found = traced("load", maps, "arena", "200", wanted)
    made = next(event for event in found if event.get("name") == "arena")
    placed = next(event for event in found if event.get("map") == "arena")
    assert made["map_extra"] == placed["hint"] == placed["address"] == wanted
    assert placed["flags"] == MAP_SHARED | MAP_FIXED and f"arena {wanted}\n" in out


def test_an_arena_where_user_space_has_ended(traced: Traced, compile_bpf: Compile) -> None:
    require("arena")
    beyond = hex(1 << 60)
    out, found = traced("load", compile_bpf("arenas", "#define ARENA\n" + MAPS), "arena", "100", beyond)
    assert out == "errno 12\n"
    last = found[-1]
    assert (last["event"], last["map"], last["errno"], last["address"]) == (
        "mmap",
        "arena",
        errno.ENOMEM,
        None,
    )
    assert last["hint"] == beyond


def larger_than_ram() -> int:
    """Entries of 4096 bytes: those of the artifact's 256 GB heap, or more where there is more RAM."""
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    entries = max(256 * GIB, 4 * ram) // 4096
    assert entries < 1 << 32
    return entries


def test_a_map_larger_than_ram(traced: Traced) -> None:
    entries = larger_than_ram()
    out, [event] = traced("create", "heap", str(ARRAY), "4", "4096", str(entries), str(MMAPABLE))
    assert out == "errno 12\n"
    assert (event["name"], event["errno"], event["fd"]) == ("heap", errno.ENOMEM, -1)
    assert event["bytes"] == entries * 4096


def test_an_objects_map_larger_than_ram(traced: Traced, maps: Path) -> None:
    # What the user sees of it is libbpf's one ENOMEM; the trace has the size.
    entries = larger_than_ram()
    out, found = traced("load", maps, "table", str(entries))
    assert out == "errno 12\n"
    assert {(event["name"], event["errno"]) for event in found if event["event"] == "map_create"} == {
        ("table", errno.ENOMEM)
    }
    assert found[-1]["bytes"] == entries * 4096


def test_other_refusals(traced: Traced) -> None:
    out, [event] = traced("create", "huge", str(ARRAY), "4", str(1 << 31), "1", "0")
    assert (out, event["errno"]) == ("errno 7\n", errno.E2BIG)
    out, [event] = traced("create", "odd", "9999", "4", "8", "1", "0")
    assert (out, event["errno"], event["type"], event["type_name"]) == ("errno 22\n", errno.EINVAL, 9999, "")
    # Root without the capabilities.
    powerless = ("setpriv", "--bounding-set=-sys_admin,-bpf")
    out, [event] = traced("create", "lru", str(LRU_HASH), "4", "8", "16", "0", wrapper=powerless)
    assert (out, event["errno"]) == ("errno 1\n", errno.EPERM)


def test_preloaded_and_switched_off(library: Path, program: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    arguments = [program, "create", "small", str(ARRAY), "4", "8", "16", "0"]
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    environment.pop("KFLEX_TRACE", None)
    subprocess.run(arguments, check=True, env=environment, cwd=tmp_path)
    assert not list(tmp_path.iterdir())
    subprocess.run(arguments, check=True, env={**environment, "KFLEX_TRACE": str(trace)})
    assert [event["event"] for event in events(trace) if not event.get("name", "").startswith("libbpf_")] == [
        "start",
        "map_create",
    ]


@pytest.mark.parametrize("trace", ["/dev/full", "/nowhere/trace", "fd:99"])
def test_nowhere_to_write(library: Path, program: Path, maps: Path, trace: str) -> None:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library.parent), "KFLEX_TRACE": trace}
    done = subprocess.run(
        [program, "load", maps], check=True, capture_output=True, text=True, env=environment
    )
    assert done.stdout.startswith("loaded\n")
    assert done.stderr.count("kflex-trace: ") == 1


def test_our_own_binding(library: Path, maps: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    script = "import sys; from kflex_repro.bpf import Object\nwith Object.open(sys.argv[1]) as o: o.load()"
    environment = {**os.environ, "KFLEX_LIBBPF": str(library), "KFLEX_TRACE": str(trace)}
    subprocess.run([sys.executable, "-c", script, maps], check=True, env=environment)
    names = [event.get("name") for event in events(trace) if event["event"] == "map_create"]
    assert {"table", "a_map_whose_name_the_kernel_cuts", "maps.data", "maps.rodata"} <= set(names)


# -- the artifact's search, in the synthetic tree


@pytest.fixture(scope="module")
def searching(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Searching]:
    """searching(GB): the trace of the address search for a heap of that size, after the artifact's recipe."""
    place = tmp_path_factory.mktemp("tree")
    root = place / "tree"
    shutil.copytree(HERE / "tree", root)
    tree = Tree.open(root)
    plan = apply.plan(recipe.load("libbpf-trace-artifact"), tree)
    assert apply.apply(plan, tree) and apply.status(plan.recipe, tree).state == "applied"
    sources = [root / "libbpf" / "src" / name for name in ("libbpf.c", "bpf.c")]
    made = place / "search"
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", f"-I{root / 'libbpf' / 'src'}"]
    subprocess.run([toolchain.cc().path, *flags, HERE / "search_driver.c", *sources, "-o", made], check=True)

    def run(gb: int) -> list[dict[str, Any]]:
        trace = place / "trace"
        trace.unlink(missing_ok=True)
        done = subprocess.run(
            [made, str(gb)],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "KFLEX_TRACE": str(trace)},
        )
        start, *found = events(trace)
        assert start["event"] == "start"
        last = found[-1]
        assert done.stdout == (f"errno {last['errno']}\n" if last["errno"] else f"mapped {last['address']}\n")
        return found

    yield run
    tree.revert("libbpf-trace-artifact")
    for path in (HERE / "tree" / "libbpf" / "src").iterdir():
        assert (root / "libbpf" / "src" / path.name).read_bytes() == path.read_bytes()
    assert not (root / "libbpf" / "src" / "kflex_trace.c").exists()


@pytest.mark.parametrize("gb", [4, 128, 256])
def test_every_try_of_the_artifacts_search(searching: Searching, gb: int) -> None:
    expected = search.on_paper(search.artifact(gb * GIB), search.here().task_size)
    found = searching(gb)
    assert [event["try"] for event in found] == list(range(1, len(found) + 1))
    assert [int(event["hint"], 16) for event in found] == [
        expected.first - i * gb * GIB for i in range(len(found))
    ]
    assert {(event["map"], event["length"], event["flags"], event["prot"]) for event in found} == {
        ("heap", gb * GIB, MAP_SHARED | MAP_FIXED_NOREPLACE, 3)
    }
    assert {event["errno"] for event in found[:-1]} <= {errno.ENOMEM, errno.EEXIST}
    if expected.address is None:
        assert len(found) == 1024 and found[-1]["errno"] == errno.ENOMEM
    else:
        # Address randomisation moves it by one or two.
        assert abs(len(found) - expected.tried) <= 2 and found[-1]["address"] == found[-1]["hint"]


# -- the samples that other tests read


@pytest.mark.parametrize("sample", sorted((HERE / "data").glob("*.trace*")), ids=lambda path: path.name)
def test_the_samples_are_what_is_written_now(sample: Path, traced: Traced, searching: Searching) -> None:
    now = {
        event["event"]: list(event)
        for event in (*traced("create", "m", str(ARRAY), "4", "8", "1", "0")[1], *searching(512))
    }
    data = sample.read_bytes()
    lines = (gzip.decompress(data) if sample.suffix == ".gz" else data).decode("ascii").splitlines()
    assert lines
    for event in map(json.loads, lines):
        assert event["event"] == "start" or list(event) == now[event["event"]]


def test_the_recipe_says_when_it_is_another_libbpf(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    shutil.copytree(HERE / "tree", root)
    source = root / "libbpf" / "src" / "bpf.c"
    source.write_text(source.read_text().replace("sys_bpf_fd(BPF_MAP_CREATE", "sys_bpf_new(BPF_MAP_CREATE"))
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with pytest.raises(KflexError, match="step 5: call of sys_bpf_fd in bpf_map_create: not found"):
        apply.plan(recipe.load("libbpf-trace-artifact"), Tree.open(root))
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
