"""The report stands alone, escapes what it shows, and says wrong answers first."""

from __future__ import annotations

import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from kflex_repro.bench import plot
from kflex_repro.bench.canvas import DARK, LIGHT
from kflex_repro.bench.report import render, write_report
from kflex_repro.bench.result import Recovery
from kflex_repro.bench.stats import figure
from kflex_repro.bench.summary import closing_line, count, missed_targets, number, rows, times
from tests.unit.test_bench_result import result


def png_size(data: bytes) -> tuple[int, int]:
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])  # type: ignore[return-value]


@pytest.fixture(scope="module")
def document() -> dict[str, object]:
    made = result("get-2t", "set-2t", "mix-90-10", "burst", "get-2t-p16", "rate-get")
    burst = next(s for s in made.scenarios if s.scenario.name == "burst")
    recovery = Recovery(figure([0.2, 0.3]), (2.0, 3.0), ((1.0, 0.98), (2.5, 0.5), (3.3, 0.98)))
    scenarios = tuple(replace(s, recovery=recovery) if s is burst else s for s in made.scenarios)
    return replace(made, scenarios=scenarios).to_json()


@pytest.fixture(scope="module")
def page(document: dict[str, object]) -> str:
    return render(document)


def test_every_plot_is_drawn_in_both_themes(document: dict[str, object]) -> None:
    for theme in (LIGHT, DARK):
        drawn = plot.draw(document, theme)
        assert set(drawn) == {"throughput", "ratio", "latency", "cpu", "recovery"}
        for data in drawn.values():
            width, height = png_size(data)
            assert width > 1000
            assert height > 300


def test_nothing_measured_draws_nothing() -> None:
    empty = result("no such scenario").to_json()
    assert plot.draw(empty, LIGHT) == {}
    assert "nothing was completed" in render(empty)


def test_the_report_needs_no_network_and_no_script(page: str) -> None:
    assert "<script" not in page
    loaded = re.findall(r'(?:src|srcset)="([^"]{0,40})', page)
    assert loaded
    assert all(source.startswith("data:image/png;base64,") for source in loaded)
    assert "prefers-color-scheme: dark" in page


def test_published_figures_are_apart_and_say_so(page: str) -> None:
    ours, _, others = page.partition('<section class="others">')
    assert "other machines" in others
    assert "NSDI" in others
    assert "NSDI" not in ours


def test_what_the_report_shows_is_escaped() -> None:
    page = render({**result("no such scenario").to_json(), "command": "<b>&", "notes": ["<i>"]})
    assert "<b>&<" not in page
    assert "&lt;b&gt;&amp;" in page
    assert "<i>" not in page


def test_files_are_written(tmp_path: Path, document: dict[str, object]) -> None:
    written = write_report(document, tmp_path)
    assert {path.name for path in written} == {
        "report.html", "throughput.png", "ratio.png", "latency.png", "cpu.png", "recovery.png",
    }  # fmt: skip
    assert all(path.stat().st_size for path in written)


def test_the_closing_line_answers_three_questions(document: dict[str, object]) -> None:
    line = closing_line(document)
    assert "\n" not in line
    assert "GET 2.50×" in line
    assert "system CPU" in line
    assert line.endswith("all 1,800 checked answers were right")


def test_wrong_answers_come_first() -> None:
    made = result("get-2t", mismatches=2).to_json()
    assert closing_line(made).startswith("WRONG ANSWERS: 2 of 300")
    page = render(made)
    assert "Wrong answers" in page
    assert 'class="say wrong"' in page


def test_an_interrupted_run_says_so() -> None:
    made = result("get-2t", interrupted=True).to_json()
    assert closing_line(made).startswith("interrupted; ")
    assert "cut short" in render(made)


def test_missed_targets_are_listed(document: dict[str, object]) -> None:
    assert any(line.startswith("get-2t: p99") for line in missed_targets(document))
    assert {row.name for row in rows(document)} >= {"get-2t", "burst"}


def test_numbers() -> None:
    assert [count(v) for v in (None, 7, 4321, 84321, 1.5e6)] == ["–", "7", "4.3k", "84k", "1.50M"]
    assert [number(v) for v in (None, 0, 0.0123, 0.5, 2.345, 23.45, 234.5)] == [
        "–", "0", "0.012", "0.50", "2.35", "23.4", "234",
    ]  # fmt: skip
    assert times({"median": 2.0, "min": 1.5, "max": 3.0, "runs": [1, 2]}) == "2.00× (1.50–3.00)"
    assert times(None) == "–"
