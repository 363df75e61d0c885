"""An attached offload: found from its pins, looked at, taken off."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import time
from pathlib import Path
from typing import Any

from kflex_repro import build
from kflex_repro.bpf import fs
from kflex_repro.bpf.btf import Btf
from kflex_repro.bpf.libbpf import AttachType
from kflex_repro.bpf.links import Link, Program
from kflex_repro.bpf.maps import Map
from kflex_repro.bpf.object import Object
from kflex_repro.errors import KflexError, Unavailable
from kflex_repro.offload import adopt, link, netns, places, recover, target
from kflex_repro.patience import patient

OBJECT = "offload_local"
MAPS = (
    *("ctl", "heap", "buckets", "ring", "conns", "client_socks", "server_socks", "server_addrs"),
    *("adopting", "free_conns"),
)
VERDICTS = (("kflex_client", "client_socks"), ("kflex_server", "server_socks"))
_TRACING = ("kflex_switch", "kflex_exit", "kflex_exec", "kflex_read")
_ENROL = "kflex_enrol"
UNREAD = "kflex_unread"
_STAT_SKIP = ("KFLEX_STAT_COUNT",)
# The first words of struct kflex_ctl, which every version has in the same place.
_FIXED = ("abi", "pid", "start_time")


class Session:
    """One attached server. Programs, maps and links are pinned: it outlives the process that started it.

    Sessions come from start(), attached() or find(); as a context manager, leaving stops the offload.
    """

    def __init__(self, pin_dir: Path, btf: Btf, obj: Object | None = None) -> None:
        self.pin_dir = pin_dir
        self.server_id = pin_dir.name
        self._btf = btf
        self._object = obj
        self.adoption: adopt.Adoption | None = None
        self._adoption_refused = ""
        self._maps = {name: Map.from_pin(pin_dir / name) for name in MAPS if (pin_dir / name).exists()}
        self._ctl: Any = None
        layout = btf.struct("kflex_ctl")
        # What every version has in the same place, and a start that was killed half-way has as zeros.
        self._fixed = dict.fromkeys(_FIXED, 0)
        if "ctl" in self._maps:
            view = self._maps["ctl"].mmap()
            for name in _FIXED:
                at = getattr(layout, name)
                self._fixed[name] = int.from_bytes(view[at.offset : at.offset + at.size], "little")
            # Of another version stop() can take away the pins; nothing else is known about them.
            if self._maps["ctl"].value_size == ctypes.sizeof(layout) and self.abi in (
                0,
                self._const("KFLEX_ABI"),
            ):
                self._ctl = layout.from_buffer(view)

    # --- what it is ----------------------------------------------------------------------------------------

    @property
    def run_id(self) -> str:
        """First digits of the server's run id."""
        return self.server_id.split("-")[1]

    @property
    def port(self) -> int:
        """The server's TCP port."""
        return int(self.server_id.partition("-")[0])

    @property
    def netns_inode(self) -> int:
        """Inode number of the server's network namespace, 0 for the host's own."""
        parts = self.server_id.split("-")
        return int(parts[2]) if len(parts) > 2 else 0

    def is_in(self, where: netns.Namespace) -> bool:
        """Whether its server lives in this network namespace."""
        return self.netns_inode == (0 if where.is_first else where.inode)

    @property
    def readable(self) -> bool:
        """Whether its table is of this version: otherwise only stop() works."""
        return self._ctl is not None

    @property
    def abi(self) -> int:
        """Version of its layouts (KFLEX_ABI of who started it), 0 while it is not known."""
        return self._fixed["abi"]

    @property
    def pid(self) -> int:
        """The server's process, 0 while it is not known."""
        return int(self._ctl.pid) if self._ctl is not None else self._fixed["pid"]

    @property
    def mode(self) -> str:
        """``coherent`` or ``store``."""
        return (
            "store"
            if self._ctl is not None and self._ctl.mode == self._const("KFLEX_MODE_STORE")
            else "coherent"
        )

    @property
    def server_alive(self) -> bool:
        """Whether the very process that was attached still runs."""
        try:
            began = self._ctl.start_time if self._ctl is not None else self._fixed["start_time"]
            return self.pid > 0 and target.start_time(self.pid) == began
        except KflexError:
            return False

    @property
    def disabled(self) -> str:
        """Why nothing is served: ``detached``, ``stopping``, ``server_gone``, ``unloaded``; else ``on``."""
        return self._name_of("kflex_disable", int(self._ctl.disabled))

    @property
    def allow(self) -> frozenset[str]:
        """What the rules allow now: of ``get`` and ``set``."""
        return self._permitted(int(self._ctl.allow))

    @property
    def rules(self) -> tuple[str, ...]:
        """The rules that forbid something now, e.g. ``maxmemory``, ``monitor`` (enum kflex_rule)."""
        bits = int(self._ctl.rules)
        names = self._btf.enum("kflex_rule")
        return tuple(
            name.removeprefix("KFLEX_RULE_").lower()
            for name, bit in names.items()
            if name != "KFLEX_RULE_COUNT" and bits >> bit & 1
        )

    def users(self) -> dict[str, frozenset[str]]:
        """Users of the server whose GETs or SETs may be served: name -> of ``get`` and ``set``."""
        found = {}
        for slot in range(int(self._ctl.users)):
            what = self._permitted(int(self._ctl.user_allow[slot]))
            if what:
                name = bytes(self._ctl.user[slot]).rstrip(b"\0")
                found[name.decode(errors="backslashreplace")] = what
        return found

    @property
    def users_full(self) -> bool:
        """Whether the table knows as many names of users as it can: further ones are not served."""
        return int(self._ctl.users) >= self._const("KFLEX_USER_OPEN")

    def stats(self) -> dict[str, int]:
        """Counters since attach: served_get, served_set, passed (requests), why_* (messages), module."""
        found: dict[str, int] = {}
        names = self._btf.enum("kflex_stat")
        cpus = range(int(self._ctl.cpus))
        for name, at in names.items():
            if name not in _STAT_SKIP:
                found[name.removeprefix("KFLEX_STAT_").lower()] = sum(
                    int(self._ctl.cpu[cpu].stat[at]) for cpu in cpus
                )
        for name in (
            "drained",
            "cuts",
            "populated",
            "invalidated",
            "epoch_bumps",
            "open_commands",
            "refused",
        ):
            found[name] = int(getattr(self._ctl, name))
        found["evicted"] += int(self._ctl.evicted)
        found["dirty"] = int(self._ctl.head) - int(self._ctl.tail)
        found["pending"] = int(self._ctl.tail) - int(self._ctl.journal_head)
        found["dirty_age_us_max"] = int(self._ctl.dirty_age_max) // 1000
        found["writer_wait_us_max"] = int(self._ctl.wait_max) // 1000
        found["table_bytes_used"] = int(self._ctl.bump) * self._const("KFLEX_CELL")
        return found

    @property
    def durable(self) -> bool:
        """Whether the server had its AOF on: then nothing acknowledged may be lost."""
        return self._ctl is not None and bool(self._ctl.durable)

    def leftovers(self) -> list[recover.Leftover]:
        """Acknowledged SETs of a dead server that had its AOF on, and that no server has taken over yet."""
        if not self.durable or self.mode != "coherent" or self.server_alive:
            return []
        return recover.journal(self._btf, self._ctl, self._maps["heap"], self._maps["ring"])

    def reset_max(self) -> None:
        """Forget the greatest dirty age and wait so far (stats: dirty_age_us_max, writer_wait_us_max)."""
        self._ctl.dirty_age_max = self._ctl.wait_max = 0

    @property
    def gate_open_ratio(self) -> float:
        """Share of the time in which SETs were accepted, as the server's main thread saw it."""
        return int(self._ctl.open_ns) / int(self._ctl.total_ns) if self._ctl.total_ns else 0.0

    @property
    def table_bytes(self) -> int:
        """RAM that the table takes."""
        return sum(
            m.stride * m.max_entries for n, m in self._maps.items() if n in ("heap", "buckets", "ring")
        )

    def refresh_addresses(self) -> None:
        """Tell the kernel which addresses the server has now: connections to others are left alone."""
        known = self._maps["server_addrs"]
        # store mode knows the pid from INFO only, and needs no more than loopback.
        now = {address.packed for address in netns.addresses(self.pid)} if self.server_alive else set()
        for stale in set(known.keys()) - now:
            known.delete(stale)
        for address in sorted(now)[: known.max_entries]:
            known.update(address, b"\1")

    def unread(self) -> list[int]:
        """Connections whose client has not read all replies that the kernel put into its queue."""
        return [conn for conn, waiting in self.enrolled().items() if waiting]

    def enrolled(self) -> dict[int, bool]:
        """Connections whose client's socket is in our hands, and whether it has replies of ours to read."""
        path = self.pin_dir / UNREAD
        if not path.exists():
            return {}
        opened = Link.from_pin(path)
        try:
            return {conn: bool(waiting) for conn, waiting in struct.iter_unpack("II", opened.read_iter())}
        finally:
            opened.destroy()

    def _permitted(self, bits: int) -> frozenset[str]:
        return frozenset(n for n in ("get", "set") if bits & self._const(f"KFLEX_ALLOW_{n.upper()}"))

    # --- connections ---------------------------------------------------------------------------------------

    @property
    def btf(self) -> Btf:
        """The layouts of its maps."""
        return self._btf

    def map(self, name: str) -> Map:
        """One of its maps; KflexError where this version did not make it."""
        if name not in self._maps:
            raise KflexError(f"this session has no map {name}", self.server_id, "stop and start the offload")
        return self._maps[name]

    def user_slots(self) -> dict[str, int]:
        """The slot that an older connection of each known user gets.

        CLIENT LIST shows connections that have not logged in as the default user's, too: that one gets the
        slot that proves itself when a password is needed.
        """
        slots = {
            bytes(self._ctl.user[slot]).rstrip(b"\0").decode(errors="backslashreplace"): slot
            for slot in range(int(self._ctl.users))
        }
        return {**slots, "default": self._const("KFLEX_USER_OPEN")}

    def slots_allowed(self) -> frozenset[int]:
        """Slots whose connections may GET or SET now."""
        return frozenset(slot for slot, allowed in enumerate(self._ctl.user_allow) if int(allowed))

    def connections(self) -> list[Any]:
        """Every enrolled connection as a struct kflex_conn_info."""
        layout = self._btf.struct("kflex_conn_info")
        path = self.pin_dir / adopt.LIST
        if not path.exists():
            return []
        opened = Link.from_pin(path)
        try:
            data = opened.read_iter()
        finally:
            opened.destroy()
        size = ctypes.sizeof(layout)
        return [layout.from_buffer_copy(data, at) for at in range(0, len(data) - size + 1, size)]

    def take_number(self) -> int | None:
        """Take a connection number out of use, None when there is none left; give_number() returns it."""
        taken = self.map("free_conns").pop()
        return int.from_bytes(taken, "little") if taken is not None else None

    def give_number(self, number: int) -> None:
        """Undo take_number()."""
        self.map("free_conns").push(struct.pack("I", number))

    def adoption_hindrance(self) -> str:
        """Why connections cannot be adopted here at all, "" when they can."""
        if self.mode == "store":
            return "mode store has no module to ask"
        if not (self.pin_dir / next(iter(adopt.ITERATORS))).exists():
            return (
                self._adoption_refused
                or adopt.this_kernel()
                or "this kernel refused the programs for it at start"
            )
        return "" if self.full_run_id() else "the server's kflex.so cannot be reached"

    def _const(self, name: str) -> int:
        return self._btf.constants()[name]

    def _name_of(self, enum: str, value: int) -> str:
        for name, known in self._btf.enum(enum).items():
            if known == value:
                return name.removeprefix("KFLEX_").lower()
        return f"unknown {value}"

    # --- on and off ----------------------------------------------------------------------------------------

    def suspend(self) -> None:
        """Take off the hooks that the whole machine feels (sched tracepoints, cgroup); resume() undoes it.

        Only in the process that started the session. Connections made meanwhile are never served.
        """
        self._need_object()
        for name in (*_TRACING, _ENROL):
            fs.unpin(self.pin_dir / name)

    def resume(self) -> None:
        """Undo suspend()."""
        self.attach_hooks()

    def _need_object(self) -> Object:
        if self._object is None:
            raise KflexError("only the process that started a session can change its hooks", self.server_id)
        return self._object

    def attach_hooks(self) -> None:
        programs = self._need_object().programs
        root = fs.cgroup2_root()
        if root is None:
            raise Unavailable(
                "no cgroup v2 is mounted", "/sys/fs/cgroup", "mount -t cgroup2 none /sys/fs/cgroup"
            )
        for name in (*_TRACING, _ENROL):
            if (self.pin_dir / name).exists():
                continue
            # The pin alone holds it: whoever removes that takes the program off, also while we live.
            with programs[name].attach_cgroup(root) if name == _ENROL else programs[name].attach() as made:
                made.pin(self.pin_dir / name)

    def stop(self, timeout: float | None = None, force: bool = False) -> None:
        """Take the offload off: all that the kernel accepted is in Redis, every reply read, nothing stays.

        Waits up to ``timeout`` [10] seconds for clients to read the replies in their sockets; KflexError if
        some do not (the offload then stays disabled and attached; ``force`` drops those replies instead), or
        if the server died with SETs that are not in its AOF (``force`` drops them).
        """
        timeout = patient(10.0) if timeout is None else timeout
        deadline = time.monotonic() + timeout
        if not force:
            self.keep_leftovers()
        # Not under the host's lock: clients may take their time, and others start and stop meanwhile.
        with places.locked(self.pin_dir):
            self._quiesce(deadline, timeout, force)
        with places.locked(self.pin_dir.parent), places.locked(self.pin_dir) as there:
            # Whoever started the server's offload anew in between has taken this one away.
            if there and not self._replaced():
                self.remove()
            else:
                self.close()

    def _quiesce(self, deadline: float, timeout: float, force: bool) -> None:
        """Nothing is served any more, and every reply of ours is read (``force``: or given up)."""
        try:
            self._disable(max(1.0, timeout))
        except KflexError:
            # The module still has the table mapped and brings in what is there when its server goes on.
            if not force:
                raise
        # Programs run under RCU: afterwards each of them has seen the disable word.
        _synchronize_rcu()
        while self.unread() and not force:
            if time.monotonic() > deadline:
                raise KflexError(
                    f"{len(self.unread())} connections have replies that their clients do not read",
                    f"offload of port {self.port}; it is disabled and everything passes",
                    "stop or close those clients and stop again, or use --force to drop those replies",
                )
            time.sleep(0.002)

    def _replaced(self) -> bool:
        """Whether the pins here are of a later start."""
        path = self.pin_dir / "ctl"
        if "ctl" not in self._maps or not path.exists():
            return False
        with Map.from_pin(path) as now:
            return now.id != self._maps["ctl"].id

    def _disable(self, timeout: float) -> None:
        """Have the module drain and let go; without a living server set the disable word ourselves."""
        if self._ctl is not None and self._ctl.disabled == 0:
            self._ctl.disabled = self._const("KFLEX_STOPPING")
        if self.mode == "coherent" and self.server_alive:
            run_id = self.full_run_id()
            if run_id:
                with contextlib.suppress(ConnectionError):
                    place = netns.of(self.pid)
                    link.require(
                        link.call(run_id, "KFLEX_DETACH", self._btf, timeout=timeout, where=place),
                        "let go of the table",
                    )
        if self._ctl is not None:
            self._ctl.allow = 0

    def keep_leftovers(self) -> None:
        if not self.readable and self.pid and not self.server_alive:
            raise KflexError(
                f"another version of kflex-repro (ABI {self.abi}) has left a table that may hold SETs of a "
                "dead server",
                self.server_id,
                "save them with that version's `offload recover`, or drop them: "
                f"kflex-repro offload stop --port {self.port} --force",
            )
        left = len(self.leftovers())
        if left:
            raise KflexError(
                f"the server died, and up to {left} SETs that were acknowledged are not in its AOF",
                self.server_id,
                "start it again with the module, which recovers them; or: kflex-repro offload recover "
                f"--port {self.port} [--export FILE] [--discard]",
            )

    def full_run_id(self) -> str:
        """The server's run id from its abstract socket (INFO may be out of reach), "" without one."""
        prefix = f"kflex-{self.run_id}"
        for name in netns.unix_names(self.pid):
            if name.startswith(prefix):
                return name.removeprefix("kflex-")
        return ""

    def discard(self) -> None:
        """Take off a session that nobody is served by any more. start() holds the lock, and so needs our
        directory still."""
        with places.locked(self.pin_dir):
            self._disable(1.0)
            _synchronize_rcu()
            self.remove(leave_root=False)

    def remove(self, leave_root: bool = True) -> None:
        """Everything out of the kernel. Works on whatever is left of a session."""
        programs: list[int] = []
        for name in (*_TRACING, _ENROL, UNREAD):
            fs.unpin(self.pin_dir / name)
        for name, map_name in VERDICTS:
            path = self.pin_dir / name
            if path.exists() and map_name in self._maps:
                with Program.from_pin(path) as program:
                    programs.append(program.id)
                    with contextlib.suppress(KflexError):
                        program.detach_map(self._maps[map_name], AttachType.SK_MSG_VERDICT)
                    socks = self._maps[map_name]
                    for i in range(socks.max_entries):
                        with contextlib.suppress(KflexError):
                            socks.delete(struct.pack("I", i))
            fs.unpin(path)
        self.close()
        if self.pin_dir.exists():
            for path in self.pin_dir.iterdir():
                fs.unpin(path)
            self.pin_dir.rmdir()
        _wait_gone(programs)
        if leave_root:
            places.leave_root(self.pin_dir.parent)

    def close(self) -> None:
        """Let go of our descriptors; what is pinned stays."""
        self._ctl = None
        for opened in self._maps.values():
            opened.close()
        self._maps.clear()
        if self._object is not None:
            self._object.close()
            self._object = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pin_dir.exists():
            self.stop()


# --- find --------------------------------------------------------------------------------------------------


def attached() -> list[Session]:
    """All sessions that are pinned on this host."""
    root = places.root()
    if root is None or not root.exists():
        return []
    pinned = [path for path in sorted(root.iterdir()) if path.name not in places.MARKERS and path.is_dir()]
    if not pinned:
        return []
    known = layouts()
    found = []
    for path in pinned:
        try:
            found.append(Session(path, known))
        except KflexError:
            # A stop may be taking it away as we look.
            if path.exists():
                raise
    return found


def find(port: int, where: netns.Namespace | None = None) -> Session | None:
    """The session of ``port``, in this network namespace if one is given; None if there is none."""
    hit = None
    for session in attached():
        if session.port == port and hit is None and (where is None or session.is_in(where)):
            hit = session
        else:
            session.close()
    return hit


def layouts(made: build.Built | None = None) -> Btf:
    from kflex_repro.bpf import btf

    return btf.load((made or build.ensure()).object(OBJECT))


def _synchronize_rcu() -> None:
    """MEMBARRIER_CMD_GLOBAL is synchronize_rcu() (kernel/sched/membarrier.c)."""
    libc = ctypes.CDLL(None, use_errno=True)
    sys_membarrier = {"x86_64": 324, "aarch64": 283}.get(os.uname().machine, 324)
    if libc.syscall(sys_membarrier, 1, 0, 0) != 0:
        time.sleep(0.1)  # no membarrier here: programs run for microseconds


def _wait_gone(programs: list[int], timeout: float = 3.0) -> None:
    """The kernel frees programs after a grace period: wait, so that whoever looks next sees none."""
    from kflex_repro.bpf import libbpf

    deadline = time.monotonic() + patient(timeout)
    for number in programs:
        while time.monotonic() < deadline:
            fd = libbpf.library().bpf_prog_get_fd_by_id(number)
            if fd < 0:
                break
            os.close(fd)
            time.sleep(0.005)
