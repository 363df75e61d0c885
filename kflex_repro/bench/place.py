"""Where ``bench redis`` runs: on this host, or, where its kernel refuses BPF, in a VM."""

from __future__ import annotations

import os
from dataclasses import dataclass

from kflex_repro import host
from kflex_repro.errors import KflexError, Unavailable


@dataclass(frozen=True)
class Place:
    """``vm``: in one, and ``why``; else on this host."""

    vm: bool
    why: str = ""


def in_guest() -> bool:
    """Whether this process runs in a VM of ours."""
    return os.environ.get("KFLEX_VM") == "1"


def choose(vm: bool | None, attach: str | None = None) -> Place:
    """``vm``: True and False are the user's --vm and --no-vm; None: a VM where the host refuses BPF.

    Unavailable (exit code 3), in one line, where it can run neither here nor, as asked for, there.
    """
    if vm and attach:
        raise KflexError("--attach benchmarks a server of this host, a VM has none", "--vm", exit_code=2)
    if in_guest():
        if vm:
            raise KflexError("this is a VM of ours already", "--vm", "leave out --vm", exit_code=2)
        return Place(vm=False)
    why = "asked for (--vm)" if vm else host.refusal()
    if vm or (why and vm is None and not attach):
        _need_tools()
        return Place(vm=True, why=why)
    if why:
        fix = "see kflex-repro doctor" if host.is_root() else "run it as root: sudo kflex-repro bench redis"
        if not attach:
            fix += "; or leave out --no-vm: it then runs in a VM"
        raise Unavailable(f"cannot run here, {why}", "--attach" if attach else "--no-vm", fix)
    return Place(vm=False)


def _need_tools() -> None:
    """What a VM would not have either: it is made of this host's programs."""
    lacking = [one for one in host.missing() if not one.of_kernel]
    if lacking:
        names = ", ".join(f"{one.title}: {one.value}" for one in lacking)
        raise Unavailable(f"not all is there ({names})", "", lacking[0].fix)
