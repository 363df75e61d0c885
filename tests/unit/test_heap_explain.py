"""`kflex-repro heap explain`: what it says, what it draws, what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kflex_repro import files
from kflex_repro.errors import KflexError
from kflex_repro.heap import explain, model, picture, search
from kflex_repro.heap.explain import Explanation


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kflex_repro", "heap", "explain", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def on_paper(gb: int, bits: str) -> Explanation:
    return explain.explain(gb, search.platform(bits))


# -- what it says --


def test_the_4_gb_heap_with_4_level_paging() -> None:
    ran = command("--gb", "4", "--va-bits", "47")
    assert ran.returncode == 0, ran.stderr
    text = " ".join(ran.stdout.split())
    assert "user space ends at 128 TiB (0x7ffffffff000)" in text
    assert "try 1 0x1000000000000 256 TiB ends 128.004 TiB above user space: ENOMEM" in text
    assert "try 1,024 0xfc0100000000 252.004 TiB" in text
    assert "Fails: all 1,024 tries end above user space" in text
    assert "Of 1 to 512 GB it finds a place for: 256, 512 GB." in text
    assert "try 2 0x7fff00000000 127.996 TiB ends 4 KiB above user space: ENOMEM" in text
    assert "Try 3 succeeds, at 127.992 TiB (0x7ffe00000000)." in text


def test_json_says_the_same_as_real_mmaps() -> None:
    ran = command("--gb", "256", "--json")
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert document["schema"] == 1
    assert document["platform"] == "here"
    assert document["pages"] == 256 * 262144
    assert set(document["searches"]) == {"old", "fixed"}
    fixed = document["searches"]["fixed"]
    assert fixed["real"] and fixed["ok"]
    assert fixed["address"] % (256 << 30) == 0
    assert fixed["search"]["tries"] == 1024
    objects = document["objects"]
    assert objects["once"] > 1.9 * objects["planned"]
    assert objects["planned"] > 50 * objects["retained"]


def test_one_search_only() -> None:
    document = json.loads(command("--gb", "4", "--va-bits", "la57", "--search", "old", "--json").stdout)
    assert set(document["searches"]) == {"old"}
    assert document["searches"]["old"]["attempt"] == 1
    assert document["searches"]["old"]["real"] is False


def test_a_limit_here_is_called_a_limit() -> None:
    """Under ulimit -v paper finds a place and mmap does not: both are said."""
    ran = subprocess.run(
        ["bash", "-c", f"ulimit -v 3000000; exec {sys.executable} -m kflex_repro heap explain --gb 4"],
        capture_output=True,
        text=True,
        check=True,
    )
    text = " ".join(ran.stdout.split())
    assert "are refused within user space (a limit: ulimit -v, vm.max_map_count)" in text
    assert "Paper says otherwise" in text


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--gb", "0"], "a heap of 0 GB is none (--gb): nearest that works: 1"),
        (["--gb", "3"], "nearest that works: 2"),
        (["--gb", "-1"], "a heap of -1 GB is none"),
        (["--gb", "0.5"], "takes whole GB"),
        (["--gb", "1e9"], "more pages than max_entries"),
        (["--gb", "four"], "'four' is not a number of GB"),
        (["--gb", "4", "--va-bits", "64"], "'64' is no address space"),
        (["--gb", "4", "--plot", "/nowhere/x.png"], "cannot write x.png, No such file or directory"),
        (["--gb", "4", "--plot", "x.gif"], "name a file .png or .svg"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], line: str) -> None:
    ran = command(*arguments)
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert len(ran.stderr.splitlines()) == 1
    assert line in ran.stderr


# -- what it draws --


def lines(made: Explanation, width: int = 100, unicode: bool = True) -> dict[str, str]:
    """The rows of the terminal's picture by their label, without it."""
    drawn = [line.plain for line in picture.terminal(made, width, unicode)]
    assert all(len(line) <= width for line in drawn)
    return {line.split()[0]: line.split(None, 1)[1] for line in drawn[1:-1]}


@pytest.mark.parametrize("width", [60, 100, 237])
def test_the_wall_and_the_ticks(width: int) -> None:
    rows = lines(on_paper(4, "47"), width)
    old, fixed = rows["old"], rows["fixed"]
    wall = old.index("┃")
    assert abs(wall / len(old) - 0.5) < 0.02
    assert fixed.index("┃") == wall
    # All tries of the old search in the last 1.6 % of the line; the fixed search's on both sides of the wall.
    assert set(old[:wall]) == {"━"}
    assert old.rstrip("×").count("×") == 0
    assert 1 <= old.count("×") <= 0.04 * len(old) + 1
    assert fixed[wall - 1 : wall + 2] == "✓┃×"


@pytest.mark.parametrize("bits", ["39", "47", "48", "56", "57", "sv39", "sv48", "sv57"])
@pytest.mark.parametrize("gb", [1, 4, 256, 512])
def test_no_tick_on_the_wrong_side_of_the_wall(bits: str, gb: int) -> None:
    made = on_paper(gb, bits)
    for case, row in zip(made.cases, lines(made).values(), strict=True):
        before, _, after = row.partition("┃")
        assert "×" not in before
        assert ("✓" in before) == (case.outcome.address is not None)
        assert "✓" not in after


def test_plain_ascii_where_the_terminal_has_nothing_else() -> None:
    ran = command("--gb", "4", "--va-bits", "47", PYTHONIOENCODING="ascii")
    assert ran.returncode == 0, ran.stderr
    assert "V|x" in ran.stdout
    assert ran.stdout.isascii()


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_picture_in_a_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"search.{kind}"
    made = on_paper(4, "47")
    picture.save(made, path)
    first = path.read_bytes()
    assert first.startswith(b"\x89PNG" if kind == "png" else b"<?xml")
    assert path.stat().st_mode & 0o777 == 0o644
    picture.save(made, path)
    assert path.read_bytes() == first, "drawn twice, it differs"
    if kind == "svg":
        picture.save(on_paper(8, "47"), path)
        assert path.read_bytes() != first


def test_what_the_picture_says() -> None:
    figure = picture.draw(on_paper(4, "47"))
    words = {text.get_text() for axis in figure.axes for text in (*axis.texts, axis.title)}
    titles = {axis.get_title(loc="left") for axis in figure.axes}
    assert "1,024 tries, all beyond user space" in words
    assert "try 3: mapped" in words
    assert "try 1,024\nENOMEM" in words
    assert "the last tries; user space ends 124 TiB further down" in titles


def test_a_picture_that_cannot_be_drawn_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "search.png"
    path.write_bytes(b"the old one")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(KflexError, match=r"cannot write search\.png, No space left .*--plot"):
        picture.save(on_paper(4, "47"), path)
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_places() -> None:
    assert [explain.place(number) for number in (0, 4096, 5 << 30, 1 << 47, 1 << 56)] == [
        "0 bytes",
        "4 KiB",
        "5 GiB",
        "128 TiB",
        "64 PiB",
    ]
    assert explain.place((1 << 47) - model.PAGE) == "128 TiB"


# -- the documentation --


def test_the_figures_of_the_documentation() -> None:
    """docs/heap.md: the capacities (2 CPUs), and the table of address spaces, are what the model says."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "heap.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    cases = {
        "ordinary memory": model.Allocator(cpus=2, doubled=False),
        "the heap's, `MALLOC_CONF=retain:false`": model.Allocator(cpus=2),
        "the heap's, jemalloc's default": model.Allocator(cpus=2, retain=True),
    }
    for name, allocator in cases.items():
        (row,) = (row for row in rows if row[0] == name)
        assert row[2:] == [f"{model.largest_objects(gb, allocator):,}" for gb in (4, 16, 256)]
        assert row[1].endswith(f"a heap of {model.smallest_gb(explain.ARTIFACT_OBJECTS, allocator):,} GB")
    described = 0
    for known in search.PLATFORMS:
        for row in rows:
            if f"(`{known.name}`)" in row[0] or (f"(`{known.bits}`)" in row[0] and "riscv" not in known.text):
                assert row[1] == explain.place(known.task_size)
                works = explain.works_for(known, "old")
                assert row[2].startswith("all" if len(works) == 10 else str(works[0]) if works else "none")
                described += 1
    assert described == len(search.PLATFORMS)
