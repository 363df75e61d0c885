"""One run of the smoke tests, or of all marked ``emulated``, in a guest: which, and what came of each."""

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
# A quiet machine takes two minutes under TCG, a quarter of an hour for all; a busy one may.
TIMEOUT, TIMEOUT_ALL = 900.0, 3600.0
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

    @property
    def fine(self) -> bool:
        """A guest has what smoke tests need; another test may want more than BPF, and is skipped then."""
        return self.outcome == "passed" or (self.outcome == "skipped" and not self.area)


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
        bad = [f"{test.name}: {test.outcome}\n{test.text}" for test in self.tests if not test.fine]
        empty = [f"no test of {area} ran" for area in AREAS if not self.of(area)]
        return (*bad, *empty)

    @property
    def summary(self) -> str:
        """One line: what ran where, and how long it took."""
        passed = sum(test.outcome == "passed" for test in self.tests)
        skipped = sum(test.outcome == "skipped" for test in self.tests if test.fine)
        tests = "smoke tests" if all(test.area for test in self.tests) else "tests that need BPF"
        rest = f", {skipped} skipped," if skipped else ""
        how = f"{self.accel.upper()}, up after {self.boot_seconds:.0f} s, done after {self.seconds:.0f} s"
        return f"{passed} of {len(self.tests)} {tests} pass{rest} on {self.release} ({how})"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ok": not self.problems}


def modules(everything: bool = False) -> tuple[str, ...]:
    """The test modules that have smoke tests (``everything``: or are ``emulated``), relative to the tree:
    collecting all others is slow there."""
    names = [f"pytest.mark.{name}" for name in ("smoke(", *(("emulated",) if everything else ()))]
    texts = ((path, path.read_text()) for path in (ROOT / "tests").rglob("test_*.py"))
    found = (path for path, text in texts if any(name in text for name in names))
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
    timeout: float | None = None,
    everything: bool = False,
    stdout: Sink = lambda _data: None,
    note: Note = lambda _line: None,
) -> Smoke:
    """Boot the kernel of a ``spec``, run the smoke tests there (with ``everything`` also those marked
    ``emulated``), read what they left in ``out``.

    A guest that does not come up, or ends without results, is a ``failure``; Unavailable means that this
    host has no VM at all.
    """
    from kflex_repro.vm import kernels
    from kflex_repro.vm import run as vm

    kernel = kernels.find(spec, note)
    name = kernel.release if os.sep in spec else kernel.name
    tests = "(smoke or emulated) and not soak" if everything else "smoke"
    try:
        vm.prepare(kernel, note)
        outcome = vm.run(
            vm.Request(
                command=(sys.executable, "-m", "tests.vm.inside", tests, *modules(everything)),
                kernel=kernel,
                accel=accel,
                timeout=timeout or (TIMEOUT_ALL if everything else TIMEOUT),
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
