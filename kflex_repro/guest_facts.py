"""What doctor finds in a VM of ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from kflex_repro.errors import KflexError
from kflex_repro.vm import kernels, run, toolkit

# Booting with a retry, and every probe on an emulated CPU (s).
_TIMEOUT_S = 600.0


def ask(say: Callable[[str], None], note: Callable[[str], None]) -> dict[str, Any]:
    """The report of ``doctor --json`` in a guest of the stock kernel, with what the guest was as ``vm``.

    ``say`` is told what is going on, ``note`` what the user should know. KflexError if there is no report.
    """
    out, complaints = bytearray(), bytearray()
    say("looking for a kernel")
    kernel = kernels.find(kernels.STOCK, note)
    say(f"asking Linux {kernel.release} in a VM")
    request = toolkit.request(["doctor", "--json"], kernel, _TIMEOUT_S)
    outcome = run.run(request, out.extend, complaints.extend, note, progress=toolkit.progress(say))
    try:
        report = json.loads(out)
    except ValueError:
        words = complaints.decode(errors="replace").strip().splitlines()
        why = words[-1].removeprefix("kflex-repro: ") if words else f"exit status {outcome.status}"
        raise KflexError(f"doctor failed in the VM: {why}", f"its console is in {outcome.console}") from None
    vm = {"kernel": kernel.release, "accel": outcome.accel, "boot_s": round(outcome.boot_seconds, 1)}
    return {**report, "vm": vm}
