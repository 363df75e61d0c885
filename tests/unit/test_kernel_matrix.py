"""The smoke tests in VMs: what is a problem, the table of kernels, and one kernel that fails among others."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from kflex_repro.errors import KflexError
from tests.conftest import AREAS
from tests.vm import __main__ as command
from tests.vm import smoke, table

DOCS = Path(__file__).resolve().parents[2] / "docs"

# As pytest writes it: one test passed, one failed, one skipped, one whose fixture broke.
JUNIT = """<?xml version="1.0" encoding="utf-8"?><testsuites name="pytest tests"><testsuite name="pytest">
<testcase classname="tests.redis.test_a" name="test_good[0]" file="tests/redis/test_a.py" time="1.250">
 <properties><property name="area" value="serving"/></properties></testcase>
<testcase classname="tests.redis.test_a" name="test_bad" file="tests/redis/test_a.py" time="0.500">
 <properties><property name="area" value="order"/></properties>
 <failure message="assert 1 == 2">tests/redis/test_a.py:41: assert 1 == 2</failure></testcase>
<testcase classname="tests.bpf.test_b" name="test_skipped" file="tests/bpf/test_b.py" time="0.0">
 <properties><property name="area" value="bpf"/></properties>
 <skipped type="pytest.skip" message="no such thing">tests/bpf/test_b.py:4: no such thing</skipped></testcase>
<testcase classname="tests.bpf.test_b" name="test_broken" file="tests/bpf/test_b.py" time="0.0">
 <properties><property name="area" value="gate"/></properties>
 <error message="failed on setup">KflexError</error></testcase>
</testsuite></testsuites>"""


def fact(key: str, state: str = "ok") -> dict[str, str]:
    return {"key": key, "title": f"BPF {key}", "state": state, "value": ""}


def run(kernel: str = "6.12", *tests: smoke.Test, facts: tuple[dict[str, str], ...] = ()) -> smoke.Smoke:
    """A guest in which one test of each area passed, and these."""
    good = tuple(smoke.Test(f"{area}::test", area, "passed", 1.0) for area in AREAS)
    facts = facts or (fact("sk_msg"), fact("arena"))
    return smoke.Smoke(kernel, f"{kernel}.1-cloud", "tcg", 5.2, 99.6, facts, (*good, *tests))


def test_each_outcome_is_read(tmp_path: Path) -> None:
    (tmp_path / "smoke.xml").write_text(JUNIT)
    good, bad, skipped, broken = smoke.read(tmp_path / "smoke.xml")
    assert good == smoke.Test("tests/redis/test_a.py::test_good[0]", "serving", "passed", 1.25)
    assert (bad.outcome, bad.area) == ("failed", "order") and "assert 1 == 2" in bad.text
    assert (skipped.outcome, broken.outcome) == ("skipped", "error") and "no such thing" in skipped.text


@pytest.mark.parametrize("outcome", ["failed", "error", "skipped"])
def test_what_did_not_pass_is_a_problem_with_its_text(outcome: str) -> None:
    assert run().problems == ()
    found = run("6.12", smoke.Test("a.py::test_x", "gate", outcome, 0.1, "because")).problems
    assert found == (f"a.py::test_x: {outcome}\nbecause",)


def test_others_than_smoke_tests_may_be_skipped() -> None:
    """They want more than BPF now and then; but nothing else than passed or skipped is fine."""
    more = [smoke.Test(f"a.py::test_{each}", "", each, 0.1, "because") for each in ("passed", "skipped")]
    one = run("6.12", *more)
    assert one.problems == ()
    assert f"{len(AREAS) + 1} of {len(AREAS) + 2} tests that need BPF pass, 1 skipped, on" in one.summary
    rows = {name: cells for name, *cells in table.rows([one, run("6.1")])}
    assert rows["other tests"] == ["1", "–"] and rows["smoke tests"] == [f"all {len(AREAS)} pass"] * 2
    bad = run("6.12", *more, smoke.Test("a.py::test_bad", "", "failed", 0.1, "because"))
    assert bad.problems == ("a.py::test_bad: failed\nbecause",)
    (row,) = (cells for name, *cells in table.rows([bad]) if name == "other tests")
    assert row == ["**1 of 3**"]


def test_with_everything_come_the_modules_that_are_emulated() -> None:
    more = set(smoke.modules(everything=True))
    assert more > set(smoke.modules()) and "tests/bpf/test_binding.py" in more
    assert not {name for name in more if "bench" in name or "linearizable" in name}


def test_an_area_without_a_test_is_a_problem() -> None:
    one = run()
    fewer = smoke.Smoke("6.12", tests=tuple(test for test in one.tests if test.area != "recovery"))
    assert fewer.problems == ("no test of recovery ran",)
    assert smoke.Smoke("6.12", failure="it never came up").problems == ("it never came up",)


def test_every_area_has_tests_in_the_modules_that_are_run() -> None:
    modules = smoke.modules()
    assert "tests/redis/test_offload_serving.py" in modules
    text = "".join((smoke.ROOT / name).read_text() for name in modules)
    assert set(re.findall(r"mark\.smoke\(\"(\w+)\"\)", text)) == set(AREAS)


def test_the_table_has_a_column_for_each_kernel() -> None:
    bad = smoke.Test("a.py::test_x", "gate", "failed", 0.1)
    old = run("6.1", bad, facts=(fact("sk_msg"), fact("arena", "degraded")))
    dead = smoke.Smoke("7.0", "7.0.1", failure="it panicked")
    rows = {name: cells for name, *cells in table.rows([old, run("6.12"), dead])}
    assert rows[""] == ["6.1", "6.12", "7.0"]
    assert rows["BPF sk_msg"] == ["yes", "yes", "–"] and rows["BPF arena"] == ["no", "yes", "–"]
    assert rows["up after"] == ["5 s", "5 s", "–"]
    assert rows["smoke: gate"] == ["**1 of 2**", "1", "–"]
    assert rows["smoke tests"] == ["**fail**", f"all {len(AREAS)} pass", "**did not run**"]


def test_a_documents_table_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "kernels.md"
    page.write_text(f"before\n\n{table.BEGIN}\n\n| old |\n\n{table.END}\n\nafter\n")
    table.write(page, [run()])
    assert page.read_text() == f"before\n\n{table.BEGIN}\n\n{table.markdown([run()])}\n{table.END}\n\nafter\n"
    table.write(page, [run()])
    assert page.read_text().count("release") == 1


@pytest.mark.parametrize("text", ["", table.BEGIN, table.END + table.BEGIN, f"{table.BEGIN}{table.END}" * 2])
def test_a_document_without_a_place_for_it_is_left_alone(tmp_path: Path, text: str) -> None:
    page = tmp_path / "kernels.md"
    page.write_text(text)
    with pytest.raises(KflexError, match=r"no place for the table of kernels \(.*kernels\.md\)"):
        table.write(page, [run()])
    assert page.read_text() == text


def test_the_table_that_the_documentation_keeps() -> None:
    (page,) = (page for page in sorted(DOCS.glob("*.md")) if table.BEGIN in page.read_text())
    lines = table.between(page.read_text()).strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    names = [row[0] for row in cells]
    assert len({len(row) for row in cells}) == 1, "a row has another number of cells"
    assert len(set(names)) == len(names) > len(smoke.FEATURES)
    assert {f"smoke: {what}" for what in AREAS.values()} <= set(names)
    by_name = {name: row for name, *row in cells}
    assert {"6.1", "6.12"} <= set(by_name[""])
    for tests in by_name["smoke tests"]:
        assert re.fullmatch(r"all \d+ pass", tests), tests


def test_a_kernel_that_fails_does_not_keep_the_others_from_running(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fake(spec: str, out: Path, **_options: object) -> smoke.Smoke:
        asked.append(spec)
        assert out.is_dir()
        if spec == "/no/kernel":
            raise KflexError("no such kernel", spec)
        return run(spec)

    monkeypatch.setattr(smoke, "run", fake)
    done = CliRunner().invoke(command.main, ["/no/kernel", "6.12", "--json"])
    assert asked == ["/no/kernel", "6.12"] and done.exit_code == 1
    assert [one["ok"] for one in json.loads(done.stdout)] == [False, True]
    assert "no such kernel" in done.stderr and "not all is well on: /no/kernel" in done.stderr
    assert CliRunner().invoke(command.main, ["6.12"]).exit_code == 0


def test_by_default_the_series_and_the_newest_that_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    from kflex_repro.vm import kernels

    monkeypatch.setattr(kernels, "at_hand", lambda: ("6.1", "6.12", "/cache/kernel/old", "/cache/kernel/new"))
    assert command._kernels(()) == ("6.1", "6.12", "/cache/kernel/new")
    assert command._kernels(("6.12",)) == ("6.12",)
