"""A flame graph as one HTML file that needs nothing else: zoom, search, and the difference of two profiles.

The packaged ones do not serve: of PyPI's the binding over inferno has no build for Python 3.12 or newer;
d3-flame-graph (npm; ``perf script report flamegraph`` wants it) is not in Debian: we would have to ship it.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kflex_repro.probe.stacks import Profile, Stack

_TEMPLATE = Path(__file__).with_name("flamegraph.html")


def _tree(before: Mapping[Stack, int], after: Mapping[Stack, int]) -> list[Any]:
    """[name, weight before, weight after, children...]: weights include the children's, names are sorted."""
    root: dict[str, Any] = {"name": "all", "a": 0, "b": 0, "in": {}}
    for side, weighed in (("a", before), ("b", after)):
        for stack, weight in weighed.items():
            at = root
            at[side] += weight
            for frame in stack:
                at = at["in"].setdefault(frame, {"name": frame, "a": 0, "b": 0, "in": {}})
                at[side] += weight
    return _packed(root)


def _packed(root: dict[str, Any]) -> list[Any]:
    # Not by recursion: stacks may be deeper than Python's.
    made: list[Any] = [root["name"], root["a"], root["b"]]
    waiting = [(root, made)]
    while waiting:
        node, out = waiting.pop()
        for name in sorted(node["in"]):
            child = node["in"][name]
            packed = [child["name"], child["a"], child["b"]]
            out.append(packed)
            waiting.append((child, packed))
    return made


def _page(title: str, about: str, unit: str, root: list[Any], diff: tuple[str, str] | None) -> str:
    document = {"title": title, "about": about, "unit": unit, "diff": diff, "root": root}
    # "<" as an escape: a symbol must not be able to end the script element.
    data = json.dumps(document, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    page = _TEMPLATE.read_text(encoding="utf-8")
    return page.replace("__TITLE__", html.escape(title), 1).replace("__DATA__", data, 1)


def page(profile: Profile, about: str = "") -> str:
    """The flame graph of one profile, as HTML."""
    return _page(profile.title, about, profile.unit, _tree({}, profile.stacks), None)


def difference(before: Profile, after: Profile, names: tuple[str, str] = ("before", "after")) -> str:
    """Both in one graph, as HTML: widths of one of them, colours by how the share of the whole changed."""
    title = f"{before.title} → {after.title}"
    about = f"{before.total:,} → {after.total:,} {after.unit}, compared by their shares"
    return _page(title, about, after.unit, _tree(before.stacks, after.stacks), names)
