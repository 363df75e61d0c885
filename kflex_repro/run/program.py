"""Runs the artifact's program in the foreground and takes away what it would leave behind.

Its maps, programs and the sockops link go with the process. Its XDP program does not: it has no link and
stays on the interface until it is taken off.
"""

from __future__ import annotations

import contextlib
import ctypes as c
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from kflex_repro.bpf import libbpf
from kflex_repro.errors import KflexError
from kflex_repro.heap import model
from kflex_repro.run.modes import Mode
from kflex_repro.run.needs import Interface, xdp

# util-linux's: ends the program with us, also when we are killed.
_LEASH = ("setpriv", "--pdeathsig", "TERM", "--")
# How long the program may take to end: the kernel frees its whole heap then.
_END_SECONDS = 60


def command(program: Path, mode: Mode, on: Interface | None) -> list[str]:
    """The command line of a mode."""
    words = [str(program), mode.option]
    return [*words, f"--ifindex={on.index}"] if mode.interface and on else words


def environment() -> dict[str, str]:
    """What the program gets besides our environment: what capacities are planned for; the user's wins."""
    ours = {}
    for name, value in model.ENVIRONMENT.items():
        theirs = os.environ.get(name, "")
        # jemalloc reads a list of options, the last of a kind counts.
        ours[name] = f"{value},{theirs}" if theirs else value
    return ours


def run(words: Sequence[str], on: Interface | None) -> int:
    """Run until it ends or we are interrupted: its exit code, 128 + the signal's number if one ended it.

    ``on`` is the interface it puts an XDP program on; that is off again afterwards.
    """
    try:
        # In a group of its own: Ctrl-C comes to us alone, and the program is ended in order.
        process = subprocess.Popen(
            [*_LEASH, *words],
            stdin=subprocess.DEVNULL,
            process_group=0,
            env={**os.environ, **environment()},
        )
    except OSError as error:
        raise KflexError(f"cannot run it: {error.strerror}", _LEASH[0], "apt install util-linux") from None
    try:
        code = process.wait()
    finally:
        _end(process)
        if on is not None:
            take_off(on)
    return code if code >= 0 else 128 - code


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the program, however impatient the user is."""
    while process.poll() is None:
        process.terminate()
        with contextlib.suppress(KeyboardInterrupt):
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def take_off(on: Interface) -> bool:
    """Take the XDP program off that was not there before us; whether there was one."""
    if on.xdp or not xdp(on.name):
        return False
    libbpf.check(
        libbpf.library().bpf_xdp_detach(c.c_int(on.index), c.c_uint32(0), None),
        "bpf_xdp_detach",
        on.name,
        f"ip link set dev {on.name} xdp off",
    )
    return True
