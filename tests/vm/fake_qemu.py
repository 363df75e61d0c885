"""Stands in for QEMU where a boot would add nothing: it speaks as a guest on the serial lines it inherits.

FAKE_GUEST says what the guest does; the starts are counted in the file FAKE_STARTS, a line each.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from pathlib import Path


def _lines(arguments: list[str]) -> dict[int, socket.socket]:
    """Console, standard output, standard error, control: by number."""
    found = {}
    for one in arguments:
        if match := re.fullmatch(r"socket,id=line(\d),fd=(\d+)", one):
            found[int(match.group(1))] = socket.socket(fileno=int(match.group(2)))
    return found


def main(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        print("QEMU emulator version 7.2.0")
        return 0
    with Path(os.environ["FAKE_STARTS"]).open("a") as starts:
        starts.write(("kvm" if "kvm" in arguments else "tcg") + "\n")
    times = len(Path(os.environ["FAKE_STARTS"]).read_text().splitlines())
    line = _lines(arguments)
    console, out, err, control = (line[number].sendall for number in range(4))
    guest = os.environ["FAKE_GUEST"]
    if guest == "refuses":
        print("qemu: it does not like its command line", file=sys.stderr)
        return 1
    if guest == "silent":
        signal.pause()
    console(b"Linux version 6.12\r\nfirst things first\r\n")
    if guest == "kvm breaks" and "kvm" in arguments:
        print("KVM internal error. Suberror: 1", file=sys.stderr, flush=True)
        signal.pause()
    if guest == "oops" or (guest == "oops once" and times == 1):
        console(b"Kernel panic - not syncing: int3\r\n")
        return 0
    control(b"booted 6.12 1.0\n")
    if guest == "gives up":
        control(b"failed the overlay cannot be mounted\n")
        return 0
    control(b"ready 2.0\n")
    if guest == "hangs":
        out(b"so far\n")
        console(b"the last line\r\n")
        signal.pause()
    if guest == "panics":
        console(b"BUG: unable to handle page fault\r\nKernel panic - not syncing: Fatal exception\r\n")
        return 0
    if guest == "goes off":
        return 0
    out(b"out\n")
    err(b"err\n")
    control(b"status 7\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
