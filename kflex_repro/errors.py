"""The one user-facing exception: what went wrong, where, and what to do about it."""

from __future__ import annotations

import errno
import os

EXIT_FAILED = 1
EXIT_UNAVAILABLE = 3


def _one_line(text: str) -> str:
    return " ".join(text.split())


class KflexError(Exception):
    """A failure the user can act on; ``str()`` is one line, ``what (where): fix``.

    ``exit_code`` is what the command line exits with (1 unless said; never 0); ``errno`` is the failed call's
    errno, 0 where there was none.
    """

    errno: int = 0

    def __init__(self, what: str, where: str = "", fix: str = "", exit_code: int = EXIT_FAILED) -> None:
        self.what = _one_line(what)
        self.where = _one_line(where)
        self.fix = _one_line(fix)
        self.exit_code = exit_code
        line = self.what
        if self.where:
            line += f" ({self.where})"
        if self.fix:
            line += f": {self.fix}"
        super().__init__(line)

    def __str__(self) -> str:
        return str(self.args[0])


class Unavailable(KflexError):
    """This host lacks a feature the operation needs (exit code 3)."""

    def __init__(self, what: str, where: str = "", fix: str = "", exit_code: int = EXIT_UNAVAILABLE) -> None:
        super().__init__(what, where, fix, exit_code)


_FIXES = {
    errno.EPERM: "run as root, or with the capabilities CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON",
    errno.EACCES: "run as root, or look at the permissions of the path",
    errno.ENOSPC: "free some space (or, for a map: it is full)",
    errno.ENOMEM: "less memory is free than asked for: choose a smaller table",
    errno.ENOTSUP: "this kernel does not support it: see `kflex-repro doctor`",
    # ENOTSUPP: internal to the kernel, but it leaks out of bpf().
    524: "this kernel does not support it: see `kflex-repro doctor`",
    errno.EOPNOTSUPP: "this kernel does not support it: see `kflex-repro doctor`",
    errno.E2BIG: "larger than this kernel's limit",
    errno.EBUSY: "something else holds it: `kflex-repro offload status` shows what is attached",
    errno.EROFS: "the file system is read-only",
}


def errno_text(code: int) -> str:
    """``EPERM: Operation not permitted`` for an errno (its sign does not matter)."""
    code = abs(code)
    if code == 524:
        return "ENOTSUPP: Operation is not supported by this kernel"
    return f"{errno.errorcode.get(code, f'errno {code}')}: {os.strerror(code)}"


def os_failure(call: str, code: int, where: str = "", fix: str = "") -> KflexError:
    """The error for a failed system or libbpf call: names the call, its errno, and what to do."""
    code = abs(code)
    error = KflexError(f"{call} failed, {errno_text(code)}", where, fix or _FIXES.get(code, ""))
    error.errno = code
    return error
