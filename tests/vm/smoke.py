"""One run of the smoke tests in a guest: which they are, and what came of each of them."""

from __future__ import annotations

import json
import os
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kflex_repro.errors import KflexError, Unavailable
from tests.conftest import AREAS

ROOT = Path(__file__).resolve().parents[2]
# The guest's files in $KFLEX_OUT.
FACTS, RESULTS = "facts.json", "smoke.xml"
# Rows of `kflex-repro doctor` that a kernel decides.
FEATURES = (
    *("btf", "jit", "mmapable", "sockops", "sk_msg", "tp_btf", "iter_tcp"),
    *("sk_skb", "tcx", "fentry", "kprobe", "uprobe_multi", "arena"),
)
# A quiet machine takes two minutes under TCG; a busy one may.
TIMEOUT = 900.0
# No test of these wants a plugin, and importing them takes half a minute there.
ENVIRONMENT = {"KFLEX_REQUIRE_BPF": "1", "PYTHONUNBUFFERED": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

Sink = Callable[[bytes], None]
Note = Callable[[str], None]


@dataclass(frozen=True)
class Test:
    """One test as the guest ran it; ``outcome`` is passed, failed, error or skipped, ``text`` why."""

    name: str
    area: str
    outcome: str
    seconds: float
    text: str = ""


@dataclass(frozen=True)
class Smoke:
    """One guest. ``failure`` is why there are no results, or "" ; times in seconds."""

    kernel: str
    release: str = ""
    accel: str = ""
    boot_seconds: float = 0.0
    seconds: float = 0.0
    facts: tuple[Mapping[str, Any], ...] = ()
    tests: tuple[Test, ...] = field(default=(), repr=False)
    failure: str = ""

    def of(self, area: str) -> tuple[Test, ...]:
        return tuple(test for test in self.tests if test.area == area)

    @property
    def problems(self) -> tuple[str, ...]:
        """Everything that is not as it must be: no results, a test that did not pass, an area without one."""
        if self.failure:
            return (self.failure,)
        bad = [f"{test.name}: {test.outcome}\n{test.text}" for test in self.tests if test.outcome != "passed"]
        empty = [f"no test of {area} ran" for area in AREAS if not self.of(area)]
        return (*bad, *empty)

    @property
    def summary(self) -> str:
        """One line: what ran where, and how long it took."""
        passed = sum(test.outcome == "passed" for test in self.tests)
        how = f"{self.accel.upper()}, up after {self.boot_seconds:.0f} s, done after {self.seconds:.0f} s"
        return f"{passed} of {len(self.tests)} smoke tests pass on {self.release} ({how})"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ok": not self.problems}


def modules() -> tuple[str, ...]:
    """The test modules that have smoke tests, relative to the tree: collecting all others is slow there."""
    found = (path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.smoke(" in path.read_text())
    return tuple(sorted(str(path.relative_to(ROOT)) for path in found))


def read(path: Path) -> tuple[Test, ...]:
    """The tests of a JUnit file as our pytest writes it."""
    return tuple(_test(case) for case in ElementTree.parse(path).getroot().iter("testcase"))


def _test(case: ElementTree.Element) -> Test:
    outcome, text = "passed", ""
    for kind, word in (("skipped", "skipped"), ("failure", "failed"), ("error", "error")):
        for bad in case.findall(kind):
            outcome = word
            text += "\n".join(filter(None, (bad.get("message"), bad.text)))
    area = next((each.get("value", "") for each in case.iter("property") if each.get("name") == "area"), "")
    name = f"{case.get('file') or case.get('classname', '')}::{case.get('name')}"
    return Test(name, area, outcome, float(case.get("time", 0)), text.strip())


def run(
    spec: str,
    out: Path,
    *,
    accel: str = "auto",
    timeout: float = TIMEOUT,
    stdout: Sink = lambda _data: None,
    note: Note = lambda _line: None,
) -> Smoke:
    """Boot the kernel of a ``spec``, run the smoke tests there, read what they left in ``out``.

    A guest that does not come up, or ends without results, is a ``failure``; Unavailable means that this
    host has no VM at all.
    """
    from kflex_repro.vm import kernels
    from kflex_repro.vm import run as vm

    kernel = kernels.find(spec, note)
    name = kernel.release if os.sep in spec else kernel.name
    try:
        vm.prepare(kernel, note)
        outcome = vm.run(
            vm.Request(
                command=(sys.executable, "-m", "tests.vm.inside", *modules()),
                kernel=kernel,
                accel=accel,
                timeout=timeout,
                cwd=ROOT,
                env=ENVIRONMENT,
                out=out,
            ),
            stdout=stdout,
            stderr=stdout,
            note=note,
        )
    except Unavailable:
        raise
    except KflexError as error:
        return Smoke(name, kernel.release, failure=str(error))
    seen = (name, kernel.release, outcome.accel, outcome.boot_seconds, outcome.seconds)
    try:
        facts = tuple(json.loads((out / FACTS).read_text()))
        return Smoke(*seen, facts, read(out / RESULTS))
    except (OSError, ValueError, ElementTree.ParseError) as error:
        why = f"the guest left no results ({error}); its tests ended with status {outcome.status}"
        return Smoke(*seen, failure=why)
