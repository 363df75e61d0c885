"""Collapsed stacks, what is read from perf, and the flame graph's page."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kflex_repro.errors import KflexError
from kflex_repro.probe import flamegraph, perf, stacks
from kflex_repro.probe.histogram import Shape, Times
from kflex_repro.probe.stacks import Change, Profile, Weight

TOP = Path(__file__).resolve().parents[2]

PERF_SCRIPT = """\
redis-server 4242/4242 25923.385076:  cpu-clock:
\tffffffffc0029579 bpf_prog_7f7a6ac092f5af62_plan_request (bpf_prog_7f7a6ac092f5af62_plan_request)
\tffffffff81ece85f bpf_prog_run_pin_on_cpu ([kernel.kallsyms])
\tffffffffc0550000 [unknown] ([nf_tables])
\t          10ab59 __send@@GLIBC_2.34 (/usr/lib/x86_64-linux-gnu/libc.so.6)
\t            1000 std::map<int; char>::find(int const&) (/opt/some program (2))
\t            2000 [unknown] (/usr/bin/redis-check-rdb)
\t            3000 [unknown] (/usr/bin/redis-check-rdb)
\t      2da104f272 [unknown] ([unknown])

Web Content 77/79 1.5:  cycles:u:

io_thd_1 4242/4243 1.6:  cycles:u:
\t            1000 main (/usr/bin/x)
\t            1000 main (/usr/bin/x)
"""


def test_perf_script_is_collapsed_as_it_comes() -> None:
    lines = iter(PERF_SCRIPT.splitlines(keepends=True))
    collapsed = perf.collapse(lines)
    assert next(collapsed) == (
        "redis-server",
        "[unknown]",
        "[redis-check-rdb]",
        "std::map<int: char>::find(int const&)",
        "__send",
        "[nf_tables]_[k]",
        "bpf_prog_run_pin_on_cpu_[k]",
        "plan_request_[b]",
    )
    # It has not read further than it had to: to the next sample's first line.
    assert next(lines) == "\n" and next(lines).startswith("io_thd_1")


def test_a_sample_without_stack_and_recursion() -> None:
    assert list(perf.collapse(PERF_SCRIPT.splitlines()))[1:] == [
        ("Web Content",),
        ("io_thd_1", "main", "main"),
    ]


def test_collapsed_stacks_survive_the_file(tmp_path: Path) -> None:
    known = {("a b", "main", "f_[k]"): 3, ("a b", "main"): 1, ("io", "[unknown]"): 2}
    path = tmp_path / "some.collapsed"
    path.write_text(stacks.text(known))
    assert path.read_text().splitlines() == ["a b;main 1", "a b;main;f_[k] 3", "io;[unknown] 2"]
    assert stacks.load(path) == Profile("some.collapsed", "samples", known)
    directory = tmp_path / "profile"
    directory.mkdir()
    (directory / stacks.FILE).write_text("# of another tool\n\nx;y 1\nx;y 2\n")
    (directory / "profile.json").write_text('{"unit": "µs"}')
    assert stacks.load(directory) == Profile("profile", "µs", {("x", "y"): 3})


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("main;f\n", "line 1 is not `frame;frame count`: 'main;f'"),
        ("ok 1\nmain;f 1.5\n", "line 2 is not"),
        ("", "the profile is empty"),
        (None, "cannot read the profile"),
    ],
)
def test_what_is_no_profile_is_refused(content: str | None, text: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_text(content)
    with pytest.raises(KflexError, match=text):
        stacks.load(path)


def test_weights_of_functions_count_recursion_once() -> None:
    known = {("t", "main", "f", "f"): 5, ("t", "main"): 2, ("u", "f", "g"): 1}
    assert stacks.by_function(known) == {"main": Weight(2, 7), "f": Weight(5, 6), "g": Weight(1, 1)}


def test_a_difference_is_of_shares() -> None:
    before = {("t", "main", "slow"): 30, ("t", "main", "same"): 10}
    after = {("t", "main", "same"): 100, ("t", "main", "new"): 100, ("t", "main", "slow"): 200}
    assert stacks.changes(before, after) == [
        Change("new", 0.0, 0.25),
        Change("slow", 0.75, 0.5),
        Change("main", 0.0, 0.0),
        Change("same", 0.25, 0.25),
    ]


def data_of(page: str) -> dict[str, object]:
    text = page.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    return json.loads(text)


def test_the_page_holds_the_tree_and_needs_nothing_else() -> None:
    known = {("t", "main", "f"): 3, ("t", "main", "</script><b>"): 1, ("t",): 1}
    page = flamegraph.page(Profile("<title> & co", "samples", known), "about it")
    assert data_of(page) == {
        "title": "<title> & co",
        "about": "about it",
        "unit": "samples",
        "diff": None,
        "root": ["all", 0, 5, ["t", 0, 5, ["main", 0, 4, ["</script><b>", 0, 1], ["f", 0, 3]]]],
    }
    assert page.count("</script>") == 2 and "<title>&lt;title&gt; &amp; co</title>" in page
    assert "http" not in page and "src=" not in page and "@import" not in page
    deep = flamegraph.page(Profile("deep", "samples", {tuple("f" * 900): 1}))
    assert json.dumps(data_of(deep)).count("[") == 901


def test_the_difference_holds_both() -> None:
    page = flamegraph.difference(
        Profile("a", "samples", {("t", "f"): 1}), Profile("b", "samples", {("t", "g"): 2})
    )
    found = data_of(page)
    assert found["root"] == ["all", 1, 2, ["t", 1, 2, ["f", 1, 0], ["g", 0, 2]]]
    assert found["diff"] == ["before", "after"] and found["title"] == "a → b"


# What a person does, one after the other; the answers go into the page's title.
ACTIONS = """
<script>
const frames = () => [...document.querySelectorAll(".f")];
const named = text => frames().find(f => f.textContent === text);
const width = text => Math.round(100 * named(text).offsetWidth / by("graph").clientWidth), said = [];
said.push(width("main"), width("often"), frames().length);
by("search").value = "^rare"; by("search").oninput({target: by("search")});
said.push(by("found").textContent, document.querySelectorAll(".hit").length);
named("rarely").click();
said.push(width("rarely"), width("main"), frames().length, document.querySelectorAll(".up").length);
document.onkeydown({key: "Escape"}); document.onkeydown({key: "Escape"});
said.push(by("found").textContent, width("often"));
const height = named("all").offsetTop; by("flip").click(); said.push(height > named("all").offsetTop);
by("search").value = "f(("; by("search").oninput({target: by("search")}); said.push(by("found").textContent);
document.title = JSON.stringify(said);
</script></body>
"""


def test_the_page_zooms_and_searches_in_a_browser(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here to look at the page with")
    known = {
        ("t", "main", "often", "f((x)"): 70,
        ("t", "main", "rarely"): 20,
        ("t", "main", "rarely", "g"): 10,
    }
    page = tmp_path / "page.html"
    page.write_text(flamegraph.page(Profile("p", "samples", known)).replace("</body>", ACTIONS))
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'home'}"]
    done = subprocess.run(
        [browser, *options, "--window-size=1000,800", "--dump-dom", page.as_uri()],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = json.loads(done.stdout.partition("<title>")[2].partition("</title>")[0])
    assert said == [100, 70, 7, "matched 30.0 %", 1, 100, 100, 5, 3, "", 70, True, "matched 70.0 %"]


def test_quantiles_of_buckets() -> None:
    shape = Shape(first_bit=6, sub=4, count=122)
    assert [shape.low(index) for index in (0, 1, 2, 4, 5, 9)] == [0, 64, 80, 112, 128, 256]
    buckets = [0] * shape.count
    buckets[1], buckets[9] = 99, 1
    times = Times(shape, 99 * 70 + 300, 300, tuple(buckets))
    assert times.count == 100 and times.quantile(1.0) == 300
    median = times.quantile(0.5)
    assert median is not None and 64 <= median <= 80
    assert Times(shape, 0, 0, (0,) * shape.count).quantile(0.5) is None


def test_bad_usage_is_said() -> None:
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "kflex_repro", "profile", *args]
        return subprocess.run(command, check=False, capture_output=True, text=True, cwd=TOP)

    assert run().returncode == 2
    both = run("--all", "--pid", "1")
    assert both.returncode == 2 and "give --pid, --port or --all" in both.stderr
    assert run("diff", "/nonexistent", "/nonexistent").returncode == 2
