"""The same test file plain and with the offload: what differs, and whether that is explained."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kflex_repro import build
from tests.redis_suite.run import WHOLE, Outcome, run_file

DIFFERENCES = Path(__file__).with_name("differences.toml")


@dataclass
class Comparison:
    """The runs of one file in one mode; the first two are the pair, more follow where the pair differs."""

    file: str
    mode: str
    plain: list[Outcome] = field(default_factory=list)
    offload: list[Outcome] = field(default_factory=list)

    @property
    def runs(self) -> list[Outcome]:
        return [*self.plain, *self.offload]

    @property
    def served(self) -> int:
        return sum(each.count.served for each in self.offload)

    @property
    def different(self) -> list[str]:
        """Tests that failed with the offload and never without; tests that only one side has run."""
        failed = set[str]().union(*(each.failed for each in self.offload))
        failed -= set[str]().union(*(each.failed for each in self.plain))
        plain, offload = self._ran(self.plain), self._ran(self.offload)
        return sorted(failed | (plain ^ offload if not self.broken else set()))

    @property
    def broken(self) -> set[str]:
        """Tests that fail on both sides: they say nothing here."""
        plain = set[str]().union(*(each.failed for each in self.plain))
        return plain & set[str]().union(*(each.failed for each in self.offload))

    @staticmethod
    def _ran(runs: list[Outcome]) -> set[str]:
        return set[str]().union(
            *({name for name, ends in each.tests.items() if ends["ok"] or ends["err"]} for each in runs)
        )

    def problems(self, explained: Mapping[tuple[str, str], str]) -> list[str]:
        """Lines for whatever is not as it should be and not explained."""
        lines = []
        for name in self.different:
            if (self.file, name) in explained:
                continue
            times = sum(name in each.failed for each in self.offload)
            detail = next(
                (o.details[name] for o in self.offload if name in o.details), "only one side ran it"
            )
            lines.append(
                f"{self.file} ({self.mode}): {name}: failed {times} of {len(self.offload)} times offloaded, "
                f"0 of {len(self.plain)} plain: {' '.join(detail.split())[:400]}"
            )
        if WHOLE in self.broken:
            lines.append(
                f"{self.file} ({self.mode}): did not run: {self.plain[0].details.get(WHOLE, '')[-400:]}"
            )
        for each in self.offload:
            if each.count.broken_promises:
                lines.append(f"{self.file} ({self.mode}): {each.count.broken_promises}")
            lines += [f"{self.file} ({self.mode}): {trouble}" for trouble in each.count.trouble]
        return lines

    def row(self) -> tuple[str, str, str, str, str, str]:
        def passed(runs: list[Outcome]) -> str:
            first = runs[0]
            failed = f", {len(first.failed)} failed" if first.failed else ""
            return f"{first.total('ok')}{failed}"

        return (
            self.file,
            self.mode,
            passed(self.plain),
            passed(self.offload),
            f"{self.offload[0].count.served:,}",
            ", ".join(self.different),
        )

    def __str__(self) -> str:
        file, mode, plain, offload, served, different = self.row()
        seconds = " and ".join(f"{each[0].seconds:.0f}" for each in (self.plain, self.offload))
        line = f"{file} ({mode}): plain {plain}; offload {offload}; {served} served; {seconds} s"
        missed = self.offload[0].count.not_attached
        if missed:
            line += f"; not attached: {dict(missed)}"
        return f"{line}; DIFFERENT: {different}" if different else line

    def keep(self, out: Path) -> None:
        """The suite's own output, a file for each run."""
        for what, runs in (("plain", self.plain), ("offload", self.offload)):
            for number, each in enumerate(runs):
                name = f"{self.file.replace('/', '-')}.{self.mode.replace(' ', '-')}.{what}{number or ''}.log"
                (out / name).write_text(each.log)


def compare(file: str, mode: str, built: build.Built, baseport: int, reruns: int) -> Comparison:
    """A pair of runs; where it differs ``reruns`` more, until the plain side has shown the same."""
    found = Comparison(file, mode)
    for _ in range(1 + reruns):
        found.plain.append(run_file(file, mode, None, baseport=baseport))
        found.offload.append(run_file(file, mode, built, baseport=baseport))
        if not found.different:
            break
    return found


def explanations(path: Path = DIFFERENCES) -> dict[tuple[str, str], str]:
    """(file, test) of the differences that are right, and why."""
    entries = tomllib.loads(path.read_text()).get("difference", [])
    return {(entry["file"], entry["test"]): entry["why"] for entry in entries}


def markdown(found: list[Comparison]) -> str:
    lines = [
        "| file | mode | plain: passed | offload: passed | served in the kernel | differences |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += ["| " + " | ".join(each.row()) + " |" for each in found]
    return "\n".join(lines)
