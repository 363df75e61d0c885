"""Run a command as systemd runs a hardened service: `python confined.py UID SYSCALL... -- COMMAND`.

Only these system calls are let through, all others kill the process; besides it may have all open files that
it ever may, no new privileges, and no memory both writable and executable.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

NUMBERS = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _PR_SET_MDWE = 22, 38, 65
_AUDIT_ARCH_X86_64 = 0xC000003E
_KILL, _ALLOW = 0x80000000, 0x7FFF0000


def _filter(names: Iterable[str]) -> bytes:
    numbers = dict(re.findall(r"#define __NR_(\w+) (\d+)", NUMBERS.read_text()))
    load, jump, ret = 0x20, 0x15, 0x06
    code = [(load, 0, 0, 4), (jump, 1, 0, _AUDIT_ARCH_X86_64), (ret, 0, 0, _KILL), (load, 0, 0, 0)]
    for name in sorted(names):
        if name in numbers:
            code += [(jump, 0, 1, int(numbers[name])), (ret, 0, 0, _ALLOW)]
    return b"".join(struct.pack("HBBI", *one) for one in [*code, (ret, 0, 0, _KILL)])


def main() -> None:
    at = sys.argv.index("--")
    uid, names, command = int(sys.argv[1]), sys.argv[2:at], sys.argv[at + 1 :]
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_NO_NEW_PRIVS")
    libc.prctl(_PR_SET_MDWE, 1, 0, 0, 0)  # Linux 6.3; systemd uses a filter before
    code = _filter(names)
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    place = ctypes.create_string_buffer(code)
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(place)))
    if libc.prctl(_PR_SET_SECCOMP, 2, program, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_SECCOMP")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
