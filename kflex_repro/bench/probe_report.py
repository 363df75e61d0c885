"""What a result of ``bench probe`` says: lines for the terminal, and report.html with its PNGs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from kflex_repro.bench import probe_plot
from kflex_repro.bench.canvas import DARK, LIGHT
from kflex_repro.bench.mark import EMULATED, emulated
from kflex_repro.bench.probe_arms import LABELS, PLAIN, SAMPLE, bpftrace_program
from kflex_repro.bench.report import MARKS, escaped, host_table, html_table, image, marked, page
from kflex_repro.bench.scenario import data_dir, read_toml
from kflex_repro.bench.summary import count, median_of, number
from kflex_repro.files import write_atomically

Document = Mapping[str, Any]

METRICS = {
    "rps": "throughput",
    "p50": "p50",
    "p99": "p99",
    "server_cpu": "server CPU per request",
    "system_cpu": "system CPU per request",
}

_METHOD = (
    "One redis-server of ours. Every probe runs right beside a run without one, A B B A, A B B A …; two "
    "neighbours share a plain run, and every other round runs backwards. A ratio is taken within a pair; its "
    "median over the pairs is what counts, with the smallest and the largest.",
    "Each arm is attached for its run only and taken off before the next. A run is all loads one after "
    "another.",
    "Noise: every plain run divided by the plain run before it in its round, nothing attached in either. A "
    "cost smaller than that is not told apart from none by these runs.",
    "Ours are the monitor as `kflex-repro monitor` runs it, its user space included: histograms (read once a "
    "second), every event into a recording, events of one request in "
    f"{SAMPLE} into a recording.",
    "The old design was written anew from its description, not from its code: tracepoints at the beginning "
    "and the end of read and of write; each copies up to 256 bytes of the payload and sends them as one perf "
    "event, which wakes the reader. The reader, in C, counts commands and prints nothing, which flatters it; "
    "the sizes of the payload and of the buffers (64 pages per CPU) are ours.",
    "bpftrace prints a line for each read and write, payload included, into a file; its buffers are the "
    "usual.",
    "Throughput of the closed loops is by the server's own count, looked at every 40 ms, in the midst of a "
    "run.",
    "redis-benchmark for the closed loops; the fixed rate is an open loop, each request timed from the "
    "moment it was due. 64-byte values.",
    "Requests are counted by Redis itself (INFO commandstats) and compared with what each arm saw.",
)


def ratio_text(found: Mapping[str, Any] | None) -> str:
    """``−1.2 % (−2.0 … +0.3)``: the change, by the median, and its range over the pairs."""
    if found is None:
        return "–"
    text = f"{_percent(found['median'])} %"
    if len(found["runs"]) > 1:
        text += f" ({_percent(found['min'])} … {_percent(found['max'])})"
    return text


def _percent(ratio: float) -> str:
    change = (ratio - 1) * 100
    digits = 0 if abs(change) >= 100 else 1
    return f"{change:+.{digits}f}".replace("-", "−")


def goal_parts(goal: Mapping[str, Any]) -> tuple[str, str, str, bool | None]:
    """What, bound, measured, met."""
    what = f"{LABELS[goal['arm']]}: {METRICS[goal['metric']]}, {goal['op'].upper()}, {goal['load']}"
    sign, bound = ("≥", goal["at_least"]) if "at_least" in goal else ("≤", goal["at_most"])
    measured = ratio_text(goal["measured"])
    if goal["clear"] is False:
        measured += "; single pairs disagree"
    return what, f"{sign} {_percent(bound)} %", measured, goal["met"]


def verdict(document: Document) -> str:
    """One line: how many goals were met, and which were not."""
    if emulated(document):
        return EMULATED
    goals = document["goals"]
    known = [goal for goal in goals if goal["met"] is not None]
    if not known:
        return "no goal was measured"
    missed = [goal for goal in known if not goal["met"]]
    text = f"{len(known) - len(missed)} of {len(known)} goals met"
    if missed:
        names = [f"{goal['arm']} {METRICS[goal['metric']]} of {goal['op'].upper()}" for goal in missed]
        text += "; missed: " + ", ".join(names)
    return text


def doubt(document: Document) -> str:
    """What makes the verdicts worth little: plain runs that differ by more than the goals allow; else ""."""
    goals = document["goals"]
    slack = min((abs(goal.get("at_least", goal.get("at_most")) - 1) for goal in goals), default=None)
    if slack is None:
        return ""
    loads = {goal["load"] for goal in goals}
    found = [op["noise"][load]["rps"] for op in document["ops"] for load in loads]
    typical = [median(abs(run - 1) for run in one["runs"]) for one in found if one]
    if not typical or max(typical) <= slack:
        return ""
    return (
        f"plain runs differ by {max(typical):.1%} among themselves, more than the {slack:.0%} that a goal "
        "allows: take a quieter machine, or more and longer pairs"
    )


def share_seen(entry: Mapping[str, Any]) -> str:
    """``100 %``, or how much of the requests an arm saw; what was skipped on purpose counts as seen."""
    if not entry["requests"]:
        return "–"
    share = min(1.0, (entry["seen"] + entry["skipped"]) / entry["requests"])
    return "100 %" if share == 1 else f"{share * 100:.4g} %"


def rows(document: Document) -> list[tuple[str, ...]]:
    """The table: op, load, arm, requests/s, p50 and p99 in µs, and the change of each to no probe."""
    table = []
    for op in document["ops"]:
        for load in document["loads"]:
            for arm, name in document["arms"].items():
                figures = op["figures"][load][arm]
                ratio = op["ratio"][load].get(arm) or op["noise"][load]
                table.append(
                    (
                        op["name"].upper(),
                        load,
                        name,
                        count(median_of(figures["rps"])),
                        ratio_text(ratio["rps"]),
                        *(_us(figures[name]) for name in ("p50", "p99")),
                        ratio_text(ratio["p50"]),
                        share_seen(op["seen"][arm]) if arm in op["seen"] else "–",
                    )
                )
    return table


HEADINGS = ("", "load", "probe", "req/s", "change", "p50 µs", "p99 µs", "p50 change", "seen")


def _us(found: Mapping[str, Any] | None) -> str:
    value = median_of(found)
    return number(value * 1000 if value is not None else None)


# --- HTML --------------------------------------------------------------------------------------------------


def _goals(document: Document) -> str:
    body = []
    for goal in document["goals"]:
        what, bound, measured, met = goal_parts(goal)
        kind, mark = MARKS[met]
        cells = "".join(f"<td>{escaped(cell)}</td>" for cell in (what, bound, measured))
        body.append(f'<tr>{cells}<td class="{kind}">{mark}</td></tr>')
    return html_table(("goal", "bound", "measured", ""), body, "left")


def _all(document: Document) -> str:
    body = []
    for row in rows(document):
        body.append("<tr>" + "".join(f'<td class="n">{escaped(cell)}</td>' for cell in row) + "</tr>")
    return html_table(HEADINGS, body)


def _cpu(document: Document) -> str:
    body = []
    for op in document["ops"]:
        for arm, name in document["arms"].items():
            found = op["figures"]["saturation"][arm]
            ratio = op["ratio"]["saturation"].get(arm) or op["noise"]["saturation"]
            cells = [op["name"].upper(), name, _busy(found)]
            for metric in ("server_cpu", "system_cpu"):
                cells += [number(median_of(found[metric])), ratio_text(ratio[metric])]
            body.append("<tr>" + "".join(f'<td class="n">{escaped(cell)}</td>' for cell in cells) + "</tr>")
    return html_table(("", "probe", "server busy", "server µs", "change", "system µs", "change"), body)


def _busy(found: Mapping[str, Any]) -> str:
    """The share of one CPU that the server used: far from 100 %, something else was the limit."""
    rps, each = median_of(found["rps"]), median_of(found["server_cpu"])
    return f"{rps * each / 1e6:.0%}" if rps and each else "–"


def _seen(document: Document) -> str:
    body = []
    for op in document["ops"]:
        for arm, entry in op["seen"].items():
            cells = [op["name"].upper(), document["arms"][arm]]
            cells += [f"{entry[name]:,}" for name in ("requests", "seen", "skipped", "lost")]
            write = entry.get("write_us")
            cells += [share_seen(entry), number(median_of(write)) if write else "–"]
            body.append("<tr>" + "".join(f'<td class="n">{escaped(cell)}</td>' for cell in cells) + "</tr>")
    heads = (
        "",
        "probe",
        "requests",
        "seen",
        "left out by sampling",
        "known to be lost",
        "seen",
        "“latency” µs",
    )
    return html_table(heads, body)


def _programs(document: Document) -> str:
    body = []
    for arm, found in document["programs"].items():
        mode = f"{document['arms'][arm]} ({found['op'].upper()}, {found['load']})"
        every = list(found["programs"].items())
        whole = sum(entry["ns_per_request"] for _, entry in every)
        for name, entry in every:
            cells = [mode, name, f"{entry['runs_per_request']:g}"]
            cells += [number(entry["ns_per_run"]), number(entry["ns_per_request"]), ""]
            body.append("<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in cells) + "</tr>")
        cells = [mode, "together", "", "", number(whole), _share_of_cpu(document, found, whole)]
        body.append("<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in cells) + "</tr>")
    heads = ("mode", "program", "runs per request", "ns per run", "ns per request", "of the machine's CPU")
    return html_table(heads, body, "left")


def _share_of_cpu(document: Document, found: Mapping[str, Any], ns: float) -> str:
    """Of what a request takes the machine without a probe; the programs run on both sides of the socket."""
    op = next(one for one in document["ops"] if one["name"] == found["op"])
    whole = median_of(op["figures"][found["load"]][PLAIN]["system_cpu"])
    return f"{ns / (whole * 1000):.1%}" if whole else "–"


def published(path: Path | None = None) -> dict[str, Any]:
    """The team's figures, of reference.toml."""
    return dict(read_toml(path or data_dir() / "reference.toml")["monitor"])


def _published(document: Document) -> str:
    """The team's figures beside what the same kind of monitor gives here."""
    theirs = published()
    body = []
    for index, op in enumerate(theirs["ops"]):
        with_, without = theirs["with_monitor"][index], theirs["without_monitor"][index]
        ours = next((one for one in document["ops"] if one["name"] == op.lower()), None)
        here = ours["ratio"].get("single", {}).get("old", {}).get("p50") if ours else None
        figures = ours["figures"].get("single", {}) if ours else {}
        measured = [_us(figures[arm]["p50"]) if arm in figures else "–" for arm in ("old", PLAIN)]
        cells = [op, f"{with_:g}", f"{without:g}", ratio_text({"median": with_ / without, "runs": [1]})]
        cells += [*measured, ratio_text(here)]
        body.append("<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in cells) + "</tr>")
    heads = ("", "with, µs", "without, µs", "cost", "here: with, p50 µs", "without, p50 µs", "cost")
    defects = "".join(f"<li>{escaped(line)}</li>" for line in theirs["defects"])
    return (
        html_table(heads, body)
        + f"<p>{escaped(theirs['source'])}; machine: {escaped(theirs['machine'])}. What is wrong with "
        "them:</p>"
        + f"<ul>{defects}</ul>"
        + "<p>“Here” is the monitor of that design written for this comparison, one client, the time that "
        "the client sees: another machine and another quantity, so the costs may be compared, the times "
        "not.</p>"
    )


def render(document: Document) -> str:
    """The report as HTML."""
    light, dark = probe_plot.draw(document, LIGHT), probe_plot.draw(document, DARK)
    images = [image(probe_plot.PLOTS[name][0], light[name], dark[name]) for name in light]
    missed = any(goal["met"] is False for goal in document["goals"])
    parts = [
        "<h1>What probes cost</h1>",
        f'<p class="faint">{escaped(document["started"])} · <code>{escaped(document["command"])}</code></p>',
        f'<p class="say{" wrong" if missed else ""}">{escaped(verdict(document))}</p>',
    ]
    if document["interrupted"]:
        parts.append('<p class="missed">This run was cut short: what follows is what it had completed.</p>')
    if document["quick"]:
        parts.append('<p class="faint">A quick run: too short to tell a few per cent apart.</p>')
    parts += marked(document)
    if line := doubt(document):
        parts.append(f'<p class="missed">{escaped(line)}.</p>')
    if document["goals"]:
        parts += ["<h2>Goals</h2>", _goals(document)]
    parts += images
    parts += [
        "<h2>All figures</h2><p class='faint'>changes to the plain run beside it: median (smallest … "
        "largest); in the rows without a probe: plain runs among themselves</p>",
        _all(document),
    ]
    if "saturation" in document["loads"]:
        parts += [
            "<h2>CPU per request at saturation</h2><p class='faint'>Where the server is not busy all the "
            "time, its clients were the limit, and a cost shows here rather than in the throughput.</p>",
            _cpu(document),
        ]
    parts += ["<h2>What they saw</h2>", _seen(document)]
    parts += [
        f"<p>{escaped(op['about'])}: {median_of(op['existing']):.1%} of the keys existed.</p>"
        for op in document["ops"]
        if op.get("existing")
    ]
    if document["programs"]:
        parts += ["<h2>Where the cost goes</h2>", _programs(document)]
    if not emulated(document):
        parts += [
            '<section class="others"><h2>Published figures of the old monitor</h2>',
            _published(document),
            "</section>",
        ]
    parts += [
        "<h2>How it was measured</h2><ul>"
        + "".join(f"<li>{escaped(line)}</li>" for line in _METHOD)
        + "</ul>",
        f"<p>bpftrace's program:</p><pre>{escaped(bpftrace_program(0).replace('== 0', '== PID'))}</pre>",
        "<h2>Machine</h2>",
        host_table(document),
        f"<h2>Command</h2><pre>{escaped(document['command'])}</pre>",
    ]
    return page("kflex-repro: what probes cost", parts)


def write_report(document: Document, out: Path) -> Sequence[Path]:
    """Write report.html and one PNG per plot (light theme) into ``out``; the paths written."""
    written = [out / "report.html"]
    for name, data in probe_plot.draw(document, LIGHT).items():
        written.append(out / f"{name}.png")
        write_atomically(written[-1], data)
    write_atomically(written[0], render(document).encode())
    return written
