"""``bench redis`` in a VM: the guest runs it and says how it goes, line by line; results are drawn here.

The guest's part is ``bench redis --raw``: events as JSON lines on standard output, result.json under
$KFLEX_OUT, no report (drawing takes minutes on an emulated CPU).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from kflex_repro import host
from kflex_repro.bench.mark import without_ratios
from kflex_repro.bench.result import make_directory, read_result, write_document
from kflex_repro.bench.run import Options, make_plan, uninterrupted
from kflex_repro.errors import KflexError
from kflex_repro.vm import kernels, run, toolkit

_DIRECTORY = "guest"
# What a boot, with one retry, may take on top (s).
_BOOT_S = 300.0
_PATIENCE = 4.0

Note = Callable[[str], None]


# --- the guest's side -------------------------------------------------------------------------------------


def out_directory() -> Path:
    """Where the guest's part puts its results."""
    out = os.environ.get("KFLEX_OUT")
    if not out:
        raise KflexError("--raw is for the guest of bench redis --vm", "KFLEX_OUT is not set", exit_code=2)
    return Path(out) / _DIRECTORY


def say(**event: Any) -> None:
    """One event to the host."""
    print(json.dumps(event), flush=True)


# --- the host's side --------------------------------------------------------------------------------------


def arguments(options: Options) -> list[str]:
    """The guest's command line for what the user asked for here."""
    words = ["bench", "redis", "--no-vm", "--raw"]
    for name in ("quick", "netns", "probe"):
        if getattr(options, name):
            words.append(f"--{name}")
    for name in ("pairs", "seconds", "keys", "port"):
        if (value := getattr(options, name)) is not None:
            words += [f"--{name}", str(value)]
    for name in options.names:
        words += ["--scenario", name]
    return words


def timeout_s(options: Options) -> float:
    """When the guest is taken for stuck (s): long after anything that works is done, emulated or not."""
    plans = [make_plan(options), make_plan(_emulated(options))]
    return _BOOT_S + _PATIENCE * max(plan.estimate_s for plan in plans)


def _emulated(options: Options) -> Options:
    return replace(options, emulated=True)


class Guest:
    """A benchmark in a VM. ``event`` gets what the guest says; ``note`` lines for the user."""

    def __init__(
        self,
        options: Options,
        out: Path,
        command: str,
        event: Callable[[Mapping[str, Any]], None],
        note: Note,
    ) -> None:
        self._options, self._out, self._command = options, out, command
        self._event, self._note = event, note
        self._last_words = ""

    def execute(self) -> dict[str, Any]:
        """Boot, run, bring result.json home, draw the report; the document.

        KflexError in one line if there is no result, or only a part of one (which is kept, as on the host).
        """
        fresh = make_directory(self._out)
        if not os.access(self._out, os.W_OK | os.X_OK):
            # Better now than after ten minutes.
            raise KflexError("cannot write to the results directory", str(self._out), "choose another --out")
        try:
            outcome = self._boot()
            return self._bring_home(outcome)
        finally:
            with uninterrupted(), suppress(OSError):
                shutil.rmtree(self._out / _DIRECTORY, ignore_errors=True)
                if fresh:
                    # Only if it is empty.
                    self._out.rmdir()

    def _boot(self) -> run.Outcome:
        kernel = kernels.find(kernels.STOCK, self._note)
        self._event({"text": f"building BPF objects for the VM's kernel, {kernel.release}"})
        run.prepare(kernel, self._note)
        self._event({"text": f"booting Linux {kernel.release}"})
        request = toolkit.request(arguments(self._options), kernel, timeout_s(self._options), self._out)
        return run.run(
            request,
            toolkit.Lines(self._said),
            toolkit.Lines(self._complained),
            self._note,
            progress=toolkit.progress(lambda text: self._event({"text": text})),
        )

    def _said(self, line: str) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if isinstance(event, dict):
            self._event(event)
        else:
            self._note(line)

    def _complained(self, line: str) -> None:
        self._last_words = line.removeprefix("kflex-repro: ")
        if not line.startswith("kflex-repro: "):
            self._note(line)

    def _bring_home(self, outcome: run.Outcome) -> dict[str, Any]:
        path = self._out / _DIRECTORY / "result.json"
        if not path.exists():
            raise KflexError(
                f"the benchmark in the VM failed: {self._last_words or f'exit status {outcome.status}'}",
                f"Linux {outcome.kernel.release}",
                f"its console is in {outcome.console}",
            )
        document = at_home(read_result(path), outcome, self._command)
        write_document(document, self._out)
        self._event({"text": "drawing the report"})
        from kflex_repro.bench.report import write_report

        write_report(document, self._out)
        if document["interrupted"]:
            raise KflexError(f"the benchmark in the VM was cut short: {self._last_words}", str(self._out))
        return document


def at_home(document: Mapping[str, Any], outcome: run.Outcome, command: str) -> dict[str, Any]:
    """The guest's result as one of ours: with the user's command, and what the VM was."""
    vm = {
        "accel": outcome.accel,
        "kernel": outcome.kernel.origin,
        "root": outcome.root,
        "boot_s": round(outcome.boot_seconds, 1),
        "host": _host(),
    }
    # Whether it was emulated is what QEMU was told, whatever the guest takes its CPU for.
    facts = {**document["host"], "vm": vm}
    facts["emulated"] = outcome.emulated or bool(facts.get("emulated"))
    return without_ratios({**document, "host": facts, "command": command})


def _host() -> dict[str, Any]:
    return {name: value for name, value in host.machine().items() if name in ("kernel", "cpu", "cpus")}
