"""Talking to kflex.so in the server: struct kflex_msg over an abstract AF_UNIX socket, fds ride along."""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
from dataclasses import dataclass

from kflex_repro.bpf.btf import Btf
from kflex_repro.errors import KflexError
from kflex_repro.offload import netns
from kflex_repro.patience import patient


@dataclass(frozen=True)
class Answer:
    """The module's answer: 0 or a negative errno, whether a table is attached, a line of text, its pid,
    its setting kflex.table-size (bytes, 0: auto).

    To KFLEX_CLIENTS: the id of the last client listed (0: no more), for how many ns Redis stood still.
    """

    status: int
    attached: bool
    text: str
    pid: int
    table_size: int = 0
    cursor: int = 0
    gil_ns: int = 0


def call(
    run_id: str,
    verb: str,
    btf: Btf,
    fds: list[int] | None = None,
    timeout: float | None = None,
    where: netns.Namespace | None = None,
    *,
    cursor: int = 0,
    count: int = 0,
) -> Answer:
    """Send ``verb`` (KFLEX_ATTACH, KFLEX_DETACH, KFLEX_QUERY, KFLEX_CLIENTS) to the server with this run id.

    Abstract sockets belong to a network namespace: ``where`` is the server's (None: ours). ``cursor`` and
    ``count`` are KFLEX_CLIENTS': list into the memfd so many clients with greater ids. Raises
    ConnectionError when no such server listens, KflexError when it does not answer or refuses.
    """
    place = where or netns.here()

    def ask() -> Answer:
        return _ask(run_id, verb, btf, fds, patient(10.0) if timeout is None else timeout, cursor, count)

    answer = netns.call(place, ask)
    user = netns.user_of(answer.pid) if answer.status == -errno.EPERM else None
    # In a user namespace of its own the server takes our root for nobody: come as its own user.
    return answer if user is None else netns.call(place, ask, euid=user)


def _ask(
    run_id: str, verb: str, btf: Btf, fds: list[int] | None, timeout: float, cursor: int, count: int
) -> Answer:
    layout = btf.struct("kflex_msg")
    constants = btf.constants()
    message = layout(
        magic=constants["KFLEX_MAGIC"],
        abi=constants["KFLEX_ABI"],
        verb=constants[verb],
        cursor=cursor,
        count=count,
        **{f"sizeof_{name}": _sizeof(btf, f"kflex_{name}") for name in ("ctl", "entry", "bucket")},
    )
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(timeout)
        link.connect(f"\0kflex-{run_id}")
        pid = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            link.sendmsg([bytes(message)], ancillary)
            data = b""
            while len(data) < len(bytes(message)):
                part = link.recv(4096)
                if not part:
                    raise KflexError("the module closed the link", f"server {run_id[:12]}")
                data += part
        except TimeoutError:
            raise KflexError(
                f"the module does not answer within {timeout:g} s",
                f"server {run_id[:12]}, pid {pid}",
                "the server is busy or stopped: try again when it answers PING",
            ) from None
    answer = layout.from_buffer_copy(data)
    return Answer(
        status=answer.status,
        attached=bool(answer.attached),
        text=bytes(answer.text).split(b"\0")[0].decode(errors="replace"),
        pid=pid,
        table_size=int(answer.table_size),
        cursor=answer.cursor,
        gil_ns=answer.gil_ns,
    )


def require(answer: Answer, what: str) -> Answer:
    """``answer`` if it says 0, else its text as a KflexError."""
    if answer.status:
        raise KflexError(
            f"the module refuses to {what}: {answer.text or os.strerror(-answer.status)}", f"pid {answer.pid}"
        )
    return answer


def _sizeof(btf: Btf, name: str) -> int:
    import ctypes

    return ctypes.sizeof(btf.struct(name))
