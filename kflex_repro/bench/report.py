"""``report.html``: one self-contained file made from ``result.json``; light and dark, no script, offline."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kflex_repro.bench import inside, plot
from kflex_repro.bench.canvas import DARK, LIGHT
from kflex_repro.bench.mark import emulated, mark
from kflex_repro.bench.scenario import data_dir, read_toml
from kflex_repro.bench.summary import (
    closing_line,
    count,
    headings,
    median_of,
    number,
    rows,
    target_parts,
    verdict_on_answers,
)
from kflex_repro.files import write_atomically

Document = Mapping[str, Any]

_CSS = """
:root { color-scheme: light dark; --bg:#fff; --ink:#1c2128; --faint:#59636e; --line:#dfe3e8; --box:#f5f7f9;
  --good:#1a7f37; --bad:#b32b06; --accent:#0b62c4; }
@media (prefers-color-scheme: dark) { :root { --bg:#14181d; --ink:#e6ebf0; --faint:#9aa5b1; --line:#2b323b;
  --box:#1b2027; --good:#3fb950; --bad:#ff7b54; --accent:#58a6ff; } }
* { box-sizing:border-box; }
body { background:var(--bg); color:var(--ink); font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif;
  margin:0; }
main { max-width:1080px; margin:0 auto; padding:28px 20px 60px; }
h1 { font-size:26px; margin:0 0 2px; } h2 { font-size:19px; margin:44px 0 8px; }
p { margin:8px 0; } .faint { color:var(--faint); font-size:13.5px; }
.say { background:var(--box); border-left:4px solid var(--accent); padding:12px 16px; margin:18px 0;
  font-size:16.5px; }
.say.wrong { border-color:var(--bad); font-weight:600; }
.scroll { overflow-x:auto; }
table { border-collapse:collapse; font-size:13.5px; width:100%; font-variant-numeric:tabular-nums; }
th,td { text-align:right; padding:5px 9px; border-bottom:1px solid var(--line); vertical-align:top; }
th { color:var(--faint); font-weight:600; white-space:nowrap; }
th:first-child,td:first-child,.left th,.left td { text-align:left; }
td.name { min-width:210px; } td small { color:var(--faint); display:block; font-size:12px; }
td.n { white-space:nowrap; }
.met { color:var(--good); } .missed { color:var(--bad); } .unknown { color:var(--faint); }
figure { margin:34px 0; } img { width:100%; height:auto; display:block; }
code,pre { font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,monospace; }
pre { background:var(--box); padding:10px 14px; overflow-x:auto; margin:8px 0; white-space:pre-wrap; }
a { color:var(--accent); } details { margin:10px 0; } summary { cursor:pointer; } li { margin:3px 0; }
.others { border:1px dashed var(--faint); border-radius:6px; padding:4px 18px 14px; margin-top:44px; }
.others h2 { margin-top:14px; }
"""

_PLOT_TEXT = {
    "served": "Share of the requests that were answered in the kernel",
    "throughput": "Throughput of plain Redis over TCP, over its unix socket, and with the offload",
    "ratio": "Offload divided by plain Redis over TCP: throughput, p99 latency, system CPU per operation",
    "latency": "Latency percentiles, logarithmic",
    "cpu": "CPU per operation: the server's process and the whole machine",
    "recovery": "Share of requests served in the kernel around a burst of passing commands",
}

_METHOD = (
    "Each pair runs plain Redis and the offload right after one another, and every other pair the other way "
    "round; a ratio is taken within a pair. Figures are medians, with the smallest and the largest run.",
    "Plain Redis is a redis-server of its own without the module. While it is measured the offload's session "
    "is suspended: no hook of ours is on the machine.",
    "A checker beside every run (3 connections, 200 commands/s: SET, GET, APPEND, INCR, DEL) compares each "
    "answer with a model. Plain Redis has the same checker beside it.",
    "System CPU is everything the machine did per completed request, clients included: the offload moves "
    "work from the server into its clients, and this is where it shows.",
    "redis-benchmark: percentiles from its histogram (p99.9 is its 99.902 % line); throughput from its last "
    "progress line, because its own clock rounds multi-threaded runs up to 250 ms. With a pipeline it times "
    "a whole batch. resp-benchmark reports p99 only: its p50 and p99.9 are left out.",
    "Fixed rate: an open loop; each request is timed from the moment it was due, so a stall counts in full.",
)

_METHOD_EMULATED = (
    "The CPU was emulated (QEMU without KVM), 10 to 30 times slower than a real one, and not for every "
    "instruction alike: no figure here says how fast anything is, or what is faster than what.",
    "What was shown: the programs load and attach, GET and SET are served in the kernel, and the answers are "
    "right. A checker beside every run (3 connections, up to 200 commands/s: SET, GET, APPEND, INCR, DEL) "
    "compares each answer with a model; plain Redis has the same checker beside it.",
)


def marked(document: Document) -> list[str]:
    """Where it was measured, if that is not the host itself."""
    kind = "missed" if emulated(document) else "faint"
    return [f'<p class="{kind}"><b>{escaped(text)}</b></p>'] if (text := mark(document)) else []


def escaped(value: object) -> str:
    """For HTML."""
    return html.escape(str(value))


def image(about: str, light: bytes, dark: bytes) -> str:
    """A plot in both themes; ``about`` is its text for those who do not see it."""
    source = "data:image/png;base64," + base64.b64encode(dark).decode()
    fallback = "data:image/png;base64," + base64.b64encode(light).decode()
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{source}">'
        f'<img src="{fallback}" alt="{escaped(about)}"></picture></figure>'
    )


def html_table(heads: Sequence[str], body: Sequence[str], kind: str = "") -> str:
    """A table of rows that are HTML already."""
    head = "".join(f"<th>{escaped(name)}</th>" for name in heads)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _overview(document: Document) -> str:
    body = []
    for row in rows(document):
        cells = "".join(f'<td class="n">{escaped(cell)}</td>' for cell in row.cells)
        wrong = f'<small class="missed">✗ {row.wrong} wrong answers</small>' if row.wrong else ""
        name = f"{escaped(row.about)}<small>{escaped(row.name)}</small>{wrong}"
        body.append(f'<tr><td class="name">{name}</td>{cells}</tr>')
    return html_table(("scenario", *headings(document)), body)


MARKS = {True: ("met", "✓ met"), False: ("missed", "✗ missed"), None: ("unknown", "–")}


def _targets(document: Document) -> str:
    body = []
    for scenario in document["scenarios"]:
        for target in scenario.get("targets", ()):
            name, bound, found = target_parts(target)
            kind, mark = MARKS[target["met"]]
            cells = f"<td>{escaped(name)}</td><td>{escaped(bound)}</td><td>{escaped(found)}</td>"
            body.append(f'<tr><td>{escaped(scenario["name"])}</td>{cells}<td class="{kind}">{mark}</td></tr>')
    return html_table(("scenario", "what", "expected", "measured", ""), body, "left")


_DETAIL = (
    ("rps", "requests/s", count),
    ("p50_ms", "p50 ms", number),
    ("p99_ms", "p99 ms", number),
    ("p999_ms", "p99.9 ms", number),
    ("server_cpu_us_per_op", "server µs/op", number),
    ("system_cpu_us_per_op", "system µs/op", number),
)


def _spread(figure: Mapping[str, Any] | None, show: Any) -> str:
    if figure is None:
        return "–"
    text = show(median_of(figure))
    if len(figure["runs"]) > 1:
        text += f"<small>{show(figure['min'])} – {show(figure['max'])}</small>"
    return str(text)


def _details(document: Document) -> str:
    body = []
    for scenario in document["scenarios"]:
        sides = [
            ("baseline", scenario["baseline"]),
            *scenario["peers"].items(),
            ("offload", scenario["offload"]),
        ]
        for index, (arm, side) in enumerate(sides):
            cells = "".join(f'<td class="n">{_spread(side[name], show)}</td>' for name, _, show in _DETAIL)
            label = ""
            if index == 0:
                shape = (
                    f"{scenario['clients']} clients, {scenario['client_threads']} threads, "
                    f"{scenario['value_bytes']} B, pipeline {scenario['pipeline']}, "
                    f"{scenario['keys']:,} keys, {scenario['distribution']}, {scenario.get('pairs', 0)} pairs"
                )
                label = f"{escaped(scenario['name'])}<small>{escaped(shape)}</small>"
            body.append(
                f'<tr><td class="name">{label}</td>'
                f'<td class="n">{escaped(plot.ARM_NAMES[arm])}</td>{cells}</tr>'
            )
    return html_table(("scenario", "", *(head for _, head, _ in _DETAIL)), body)


def _inside(document: Document) -> list[str]:
    """What requests took inside the server, if it was watched (--probe)."""
    found = inside.rows(document, plot.ARM_NAMES)
    if not found:
        return []
    body = [
        "<tr>" + "".join(f'<td class="n">{escaped(cell)}</td>' for cell in row) + "</tr>" for row in found
    ]
    return [
        "<h2>Inside the server</h2>",
        "<p class=\"faint\">µs, p50 / p99: from a request's arrival in the server's socket to the end of the "
        "write of its reply, and its parts. Only of what reached the server: what the kernel answered itself "
        "did not. The client's figures are over all its requests.</p>",
        html_table(("scenario", "", *inside.HEADINGS), body),
    ]


def _plain(value: Any) -> str:
    """A fact as text; doctor's own rows are ``{"state": …, "value": …}``."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        if set(value) == {"state", "value"}:
            return f"{value['value']}" if value["state"] == "ok" else f"{value['state']}: {value['value']}"
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    return str(value)


def host_table(document: Document) -> str:
    """The machine and the server."""
    host = dict(document["host"])
    facts = host.pop("facts", {})
    if "ram_bytes" in host:
        host["ram"] = f"{host.pop('ram_bytes') / 2**30:.1f} GiB"
    server = document["redis"]
    arguments = " ".join(word or "''" for word in server.get("args", ()))
    host["redis-server"] = f"{server.get('version', '?')} {arguments}"
    shown = _facts(host)
    if isinstance(facts, Mapping) and facts:
        shown += f"<details><summary>everything doctor found</summary>{_facts(facts)}</details>"
    return shown


def _facts(facts: Mapping[str, Any]) -> str:
    body = [
        f"<tr><td>{escaped(key)}</td><td>{escaped(_plain(value))}</td></tr>" for key, value in facts.items()
    ]
    return html_table(("fact", "value"), body, "left")


def _published(path: Path | None = None) -> str:
    entries = read_toml(path or data_dir() / "reference.toml").get("figure", [])
    body = []
    for entry in entries:
        source = escaped(entry["source"])
        if entry.get("url"):
            source = f'<a href="{escaped(entry["url"])}">{source}</a>'
        cells = (
            escaped(entry["system"]),
            escaped(entry["what"]),
            escaped(entry["value"]),
            escaped(entry["machine"]),
            source,
        )
        body.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return html_table(("system", "what was measured", "figure", "machine", "source"), body, "left")


def page(title: str, parts: Sequence[str]) -> str:
    """A whole, self-contained page."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{_CSS}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _method(document: Document) -> tuple[str, ...]:
    return _METHOD_EMULATED if emulated(document) else _METHOD


def render(document: Document) -> str:
    """The report as HTML."""
    light, dark = plot.draw(document, LIGHT), plot.draw(document, DARK)
    images = {name: image(_PLOT_TEXT[name], light[name], dark[name]) for name in light}
    wrong = any(scenario["checked"]["mismatches"] for scenario in document["scenarios"])
    parts = [
        "<h1>Redis, and Redis with GET and SET served in the kernel</h1>",
        f'<p class="faint">{escaped(document["started"])} · <code>{escaped(document["command"])}</code></p>',
        f'<p class="say{" wrong" if wrong else ""}">{escaped(closing_line(document))}</p>',
    ]
    if document.get("interrupted"):
        parts.append('<p class="missed">This run was cut short: what follows is what it had completed.</p>')
    parts += marked(document)
    parts += [f'<p class="faint">{escaped(note)}</p>' for note in document.get("notes", ())]
    examples = [
        f"<li><code>{escaped(scenario['name'])}: {escaped(example)}</code></li>"
        for scenario in document["scenarios"]
        for example in scenario["checked"].get("examples", ())
    ]
    if examples:
        parts.append(f"<h2>Wrong answers</h2><ul>{''.join(examples[:20])}</ul>")
    parts += ["<h2>Overview</h2>", _overview(document)]
    if any(scenario.get("targets") for scenario in document["scenarios"]):
        parts += [
            "<h2>Expected and measured</h2>",
            '<p class="faint">The expectations were set for a 2-core virtual machine; elsewhere read them as '
            "a yardstick.</p>",
            _targets(document),
        ]
    parts += [
        images[name]
        for name in ("served", "ratio", "throughput", "latency", "cpu", "recovery")
        if name in images
    ]
    parts += [
        "<h2>All figures</h2><p class='faint'>median, and below it the smallest and the largest run</p>",
        *marked(document),
        _details(document),
        *_inside(document),
        f"<p>Checked: {escaped(verdict_on_answers(document))}.</p>",
        "<h2>How it was measured</h2><ul>"
        + "".join(f"<li>{escaped(line)}</li>" for line in _method(document))
        + "</ul>",
        "<h2>Machine</h2>",
        host_table(document),
        "<h2>Command</h2>",
        f"<pre>{escaped(document['command'])}</pre>",
    ]
    if not emulated(document):
        parts += [
            '<section class="others"><h2>Published figures: other machines, other programs</h2>'
            "<p>None of these was measured here, and none is comparable number by number.</p>",
            _published(),
            "</section>",
        ]
    return page("kflex-repro: Redis benchmark", parts)


def write_report(document: Document, out: Path) -> list[Path]:
    """Write report.html and one PNG per plot (light theme) into ``out``; the paths written."""
    written = []
    for name, data in plot.draw(document, LIGHT).items():
        path = out / f"{name}.png"
        write_atomically(path, data)
        written.append(path)
    path = out / "report.html"
    write_atomically(path, render(document).encode())
    return [path, *written]
