"""Attach the offload to a redis-server, find it again from its pins, take it off."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import secrets
import struct
import time
from collections.abc import Iterator
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
from kflex_repro.offload import adopt, commands, link, netns, recover, table, target
from kflex_repro.redis.server import known_good

_OBJECT = "offload_local"
_MAPS = (
    *("ctl", "heap", "buckets", "ring", "conns", "client_socks", "server_socks", "server_addrs"),
    *("adopting", "free_conns"),
)
_VERDICTS = (("kflex_client", "client_socks"), ("kflex_server", "server_socks"))
_TRACING = ("kflex_switch", "kflex_exit", "kflex_exec", "kflex_read")
_ENROL = "kflex_enrol"
_UNREAD = "kflex_unread"
_ROOT_NAME = "kflex"
# module/link.c names it.
_DRAIN_THREAD = "kflex-drain"
_DRAIN_NICE = -10
# A directory here says that we mounted bpffs, so that the last stop can take it away again.
_MOUNTED = "mounted-by-kflex"
# What the kernel itself puts into every fresh bpffs (kernel/bpf/preload).
_PRELOADED = frozenset({"maps.debug", "progs.debug"})
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
        self._maps = {name: Map.from_pin(pin_dir / name) for name in _MAPS if (pin_dir / name).exists()}
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
        path = self.pin_dir / _UNREAD
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
        self._attach_hooks()

    def _need_object(self) -> Object:
        if self._object is None:
            raise KflexError("only the process that started a session can change its hooks", self.server_id)
        return self._object

    def _attach_hooks(self) -> None:
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

    def stop(self, timeout: float = 10.0, force: bool = False) -> None:
        """Take the offload off: all that the kernel accepted is in Redis, every reply read, nothing stays.

        Waits up to ``timeout`` seconds for clients to read the replies in their sockets; KflexError if
        some do not (the offload then stays disabled and attached; ``force`` drops those replies instead), or
        if the server died with SETs that are not in its AOF (``force`` drops them).
        """
        deadline = time.monotonic() + timeout
        if not force:
            self._keep_leftovers()
        with _locked(self.pin_dir.parent), _locked(self.pin_dir):
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
            self._remove()

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

    def _keep_leftovers(self) -> None:
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

    def _discard(self) -> None:
        """Take off a session that nobody is served by any more. start() holds the lock, and so needs our
        directory still."""
        with _locked(self.pin_dir):
            self._disable(1.0)
            _synchronize_rcu()
            self._remove(leave_root=False)

    def _remove(self, leave_root: bool = True) -> None:
        """Everything out of the kernel. Works on whatever is left of a session."""
        programs: list[int] = []
        for name in (*_TRACING, _ENROL, _UNREAD):
            fs.unpin(self.pin_dir / name)
        for name, map_name in _VERDICTS:
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
            _leave_root(self.pin_dir.parent)

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


# --- start -------------------------------------------------------------------------------------------------


def start(
    port: int,
    host: str = "127.0.0.1",
    *,
    table_bytes: int | None = None,
    mode: str = "coherent",
    built: build.Built | None = None,
    login: target.Login | None = None,
    where: netns.Namespace | None = None,
    take_over: bool = True,
    budget: float = 3.0,
) -> Session:
    """Serve GET and SET of the redis-server at ``port`` from the kernel.

    The server must be a Redis 7.0 with kflex.so loaded (mode ``store``, for benchmarks only: without). Where
    it is attached already, that session is returned. ``table_bytes``: RAM for the table, None for what
    choose_table() says. ``login``: as whom to ask the server what it is, where it wants a password.
    ``where``: the network namespace in which ``host:port`` is the server, None for ours. ``take_over``: adopt
    the connections that are there already, trying those that are busy for ``budget`` seconds
    (``Session.adoption`` says what became of them). KflexError, with nothing left behind, for whatever is in
    the way.
    """
    session = _find_or_start(port, host, table_bytes, mode, built, login, where)
    if take_over and session.readable:
        # Not under the host's lock: others may start and stop meanwhile.
        with _locked(session.pin_dir):
            session.adoption = adopt.adopt(session, budget)
    return session


def _find_or_start(
    port: int,
    host: str,
    table_bytes: int | None,
    mode: str,
    built: build.Built | None,
    login: target.Login | None,
    where: netns.Namespace | None,
) -> Session:
    if os.geteuid() != 0:
        raise Unavailable("the offload needs root", "offload start", "run it with sudo")
    if not netns.in_first_pid_namespace():
        raise Unavailable(
            "BPF programs see the host's process ids, this pid namespace has others",
            "offload start",
            "run it on the host, with --pid for a server in a container",
        )
    found = target.probe(port, host, login=login, inside=where)
    made = built or build.ensure()
    if mode == "coherent":
        check_coherent(found, made)
    plan = choose_table(found, table_bytes, mode, made)
    with _entered() as root:
        same: list[Session] = []
        stale: list[Session] = []
        for session in attached():
            if session.port != port:
                session.close()
            elif session.is_in(found.where):
                (same if session.server_id == found.server_id and session.server_alive else stale).append(
                    session
                )
            elif session.readable and not session.server_alive and not session.leftovers():
                # A container's: started again, it has another network namespace.
                stale.append(session)
            else:
                session.close()
        for session in stale:
            session._keep_leftovers()
        for session in stale:
            session._discard()
        if same and (found.attached or same[0].mode == mode == "store"):
            same[0].refresh_addresses()
            return same[0]
        if same:
            # Pins without a module behind them: a start that was killed half-way.
            same[0]._discard()
        return _start(found, root / found.server_id, plan, mode, made)


def check_coherent(found: target.Target, made: build.Built | None = None) -> None:
    """KflexError unless the server is of a known version and has the module of this toolkit (or ``made``)."""
    where = f"{found.host}:{found.port}"
    if found.software != "Redis" or not known_good(found.version_numbers):
        why = "the order of its event loop has not been checked"
        if found.software == "Valkey":
            why = "with io-threads its event loop runs commands after replies, when the kernel accepts SETs"
        raise KflexError(
            f"{found.software} {found.version} is not known good: {why}",
            where,
            "use Redis 7.0 (Debian 12's redis-server)",
        )
    if found.module_abi is None:
        raise KflexError(
            "the server has not loaded kflex.so",
            where,
            "`kflex-repro offload install` puts it into redis.conf; then restart the server",
        )
    ours = _btf(made).constants()["KFLEX_ABI"]
    if found.module_abi != ours:
        raise KflexError(
            f"the server's kflex.so has ABI {found.module_abi}, this toolkit ABI {ours}",
            where,
            "install the module of this version (`kflex-repro offload install`) and restart the server",
        )


def choose_table(
    found: target.Target,
    table_bytes: int | None,
    mode: str = "coherent",
    made: build.Built | None = None,
) -> table.Plan:
    """The table that start() makes: as asked for, else as the server's setting kflex.table-size says, else
    table.auto(). KflexError when it does not fit into the free RAM, or the module cannot be asked."""
    size, where = table_bytes, "--table-size"
    if mode == "coherent":
        answer = link.require(_query(found, _btf(made)), "talk to this toolkit")
        if size is None and answer.table_size:
            size, where = answer.table_size, f"{found.host}:{found.port}, kflex.table-size"
    free = table.available()
    plan = table.plan(size if size is not None else table.auto(free), where)
    if plan.bytes > free:
        raise KflexError(
            f"a table of {plan.bytes >> 20} MiB does not fit into {free >> 20} MiB of free RAM",
            where,
            "choose a smaller one",
        )
    return plan


def _start(found: target.Target, pin_dir: Path, plan: table.Plan, mode: str, made: build.Built) -> Session:
    path = made.object(_OBJECT)
    obj = Object.open(path)
    session: Session | None = None
    try:
        pid = _server_pid(found, mode, obj.btf)
        if netns.of(pid).inode != found.where.inode:
            raise KflexError(
                "the server's process is in another network namespace than its port",
                f"{found.host}:{found.port}, pid {pid}",
                f"use --pid {pid}",
            )
        if netns.monotonic_offset(pid) != netns.monotonic_offset(os.getpid()):
            raise KflexError(
                "the server's monotonic clock is not the kernel's (a time namespace)",
                f"pid {pid}",
                "run it without one",
            )
        started = target.start_time(pid)
        obj.maps["heap"].set_max_entries(plan.chunks)
        obj.maps["buckets"].set_max_entries(plan.buckets)
        obj.maps["ring"].set_max_entries(plan.ring)
        obj.set_rodata(
            port=found.port,
            netns_cookie=netns.cookie(found.where),
            bucket_mask=plan.buckets - 1,
            ring_mask=plan.ring - 1,
            heap_cells=plan.chunks * obj.btf.constants()["KFLEX_CHUNK_CELLS"],
            store=mode == "store",
        )
        refused = adopt.prepare(obj)
        obj.load()
        _pin_all(obj, pin_dir)
        session = Session(pin_dir, obj.btf, obj)
        session._adoption_refused = refused
        _fill(session, obj, plan, found, mode, pid, started)
        if mode == "coherent":
            try:
                owner = Path(f"/proc/{pid}").stat()
            except OSError:
                raise KflexError("the server ended while the offload was started", f"pid {pid}") from None
            _give_to(pin_dir, owner)
        session.refresh_addresses()
        for name, map_name in _VERDICTS:
            obj.programs[name].attach_map(obj.maps[map_name], AttachType.SK_MSG_VERDICT)
        unread = obj.programs[_UNREAD].attach_iter(obj.maps["client_socks"])
        unread.pin(pin_dir / _UNREAD)
        unread.destroy()
        adopt.pin(obj, pin_dir, refused)
        session._attach_hooks()
        if mode == "coherent":
            fds = [obj.maps[name].fd for name in ("ctl", "heap", "buckets", "ring")]
            answer = link.call(found.run_id, "KFLEX_ATTACH", obj.btf, fds, where=found.where)
            link.require(answer, "attach")
            _hurry(pid)
        return session
    except BaseException:
        (session or Session(pin_dir, obj.btf, obj))._remove()
        raise


def _query(found: target.Target, btf: Btf) -> link.Answer:
    """The module's word on itself; KflexError where it cannot be reached."""
    try:
        return link.call(found.run_id, "KFLEX_QUERY", btf, where=found.where)
    except ConnectionError:
        raise KflexError(
            "the server's kflex.so cannot be reached",
            f"{found.host}:{found.port}",
            "it must run on this host, in the network namespace of its port",
        ) from None


def _server_pid(found: target.Target, mode: str, btf: Btf) -> int:
    """The server's pid as we see it: INFO's may be of an inner pid namespace."""
    if mode == "store":
        return found.pid
    answer = _query(found, btf)
    link.require(answer, "talk to this toolkit")
    if answer.attached:
        # Left by a forced stop: nothing is pinned, so no program serves from it.
        old = link.call(found.run_id, "KFLEX_DETACH", btf, where=found.where)
        link.require(old, "let go of its old table")
    if answer.pid <= 0:
        raise KflexError(
            "the server's process cannot be seen from here", f"{found.host}:{found.port}", "run on the host"
        )
    return answer.pid


def _hurry(pid: int) -> None:
    """Clients wait for the little that the drain thread does. The server may not raise a priority itself: a
    service's system call filter kills it for that."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            if (task / "comm").read_text().strip() == _DRAIN_THREAD:
                os.setpriority(os.PRIO_PROCESS, int(task.name), _DRAIN_NICE)


def _pin_all(obj: Object, pin_dir: Path) -> None:
    for name in _MAPS:
        obj.maps[name].pin(pin_dir / name)
    for name, _ in _VERDICTS:
        obj.programs[name].pin(pin_dir / name)


def _give_to(pin_dir: Path, owner: os.stat_result) -> None:
    """The server's user may open what it has mapped anyway: after a crash its successor must."""
    for name in ("ctl", "heap", "ring"):
        os.chown(pin_dir / name, owner.st_uid, owner.st_gid)


def _fill(
    session: Session, obj: Object, plan: table.Plan, found: target.Target, mode: str, pid: int, started: int
) -> None:
    const = obj.btf.constants()
    ctl = session._ctl
    ctl.magic, ctl.abi = const["KFLEX_MAGIC"], const["KFLEX_ABI"]
    ctl.mode = const[f"KFLEX_MODE_{mode.upper()}"]
    ctl.port, ctl.pid, ctl.tid, ctl.start_time = found.port, pid, pid, started
    ctl.seed = secrets.randbits(64)
    ctl.chunks, ctl.buckets, ctl.ring = plan.chunks, plan.buckets, plan.ring
    ctl.cpus = min(_possible_cpus(), const["KFLEX_MAX_CPUS"])
    ctl.bump = ctl.gen = 1
    ctl.table_id = secrets.randbits(64)
    if mode == "store":
        ctl.allow = const["KFLEX_ALLOW_GET"] | const["KFLEX_ALLOW_SET"]
        ctl.gate = 1
        ctl.user_allow[const["KFLEX_USER_OPEN"]] = ctl.allow
        ctl.default_open = 1
    else:
        ctl.disabled = const["KFLEX_DETACHED"]
    for i in range(const["KFLEX_MAX_CONNS"]):
        obj.maps["free_conns"].push(struct.pack("I", i))
    width = const["KFLEX_NAME"]
    for name, bits in commands.flags(obj.btf.enum("kflex_cmd_flag")).items():
        if len(name) < width:
            obj.maps["commands"].update(name.encode().ljust(width, b"\0"), struct.pack("I", bits))


def _possible_cpus() -> int:
    return 1 + max(
        int(part.rpartition("-")[2])
        for part in Path("/sys/devices/system/cpu/possible").read_text().strip().split(",")
    )


# --- find --------------------------------------------------------------------------------------------------


def attached() -> list[Session]:
    """All sessions that are pinned on this host."""
    root = _root()
    if root is None or not root.exists():
        return []
    places = [path for path in sorted(root.iterdir()) if path.name != _MOUNTED and path.is_dir()]
    if not places:
        return []
    layouts = _btf()
    found = []
    for path in places:
        try:
            found.append(Session(path, layouts))
        except KflexError:
            # A stop may be taking it away as we look.
            if path.exists():
                raise
    return found


def tidy() -> None:
    """Remove what a start that was killed at once leaves: an empty directory, a mount that nobody uses."""
    root = _root()
    if root is not None and root.exists():
        with _locked(root):
            _leave_root(root)


def find(port: int, where: netns.Namespace | None = None) -> Session | None:
    """The session of ``port``, in this network namespace if one is given; None if there is none."""
    hit = None
    for session in attached():
        if session.port == port and hit is None and (where is None or session.is_in(where)):
            hit = session
        else:
            session.close()
    return hit


def _btf(made: build.Built | None = None) -> Btf:
    from kflex_repro.bpf import btf

    return btf.load((made or build.ensure()).object(_OBJECT))


# --- places and locks --------------------------------------------------------------------------------------


def _root() -> Path | None:
    mounted = fs.bpffs_root()
    return mounted / _ROOT_NAME if mounted else None


def _enter_root() -> Path:
    """Our directory on bpffs; mounts bpffs where no one has."""
    ours = fs.bpffs_root() is None
    root = fs.ensure_bpffs() / _ROOT_NAME
    # Not exist_ok: that raises when another process removes it at this moment.
    with contextlib.suppress(FileExistsError):
        root.mkdir()
    if ours:
        (root / _MOUNTED).mkdir()
    return root


def _leave_root(root: Path) -> None:
    """Remove our directory when it is empty, and the mount if it was ours and nobody else uses it."""
    if not root.exists() or any(path.name != _MOUNTED for path in root.iterdir()):
        return
    ours = (root / _MOUNTED).exists()
    if ours:
        (root / _MOUNTED).rmdir()
    root.rmdir()
    if ours and all(path.name in _PRELOADED for path in root.parent.iterdir()):
        ctypes.CDLL(None).umount2(os.fsencode(root.parent), 2)  # MNT_DETACH: our own lock still holds it


@contextlib.contextmanager
def _entered() -> Iterator[Path]:
    """Our directory on bpffs, made if need be, and locked."""
    while True:
        root = _enter_root()
        with _locked(root) as locked:
            # Else another process has removed it meanwhile.
            if locked:
                yield root
                return


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[bool]:
    """One start or stop at a time on this host. False, and no lock, where there is no such directory."""
    deadline = time.monotonic() + 30
    while True:
        try:
            fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            yield False
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had the lock may have removed the directory: then it is a lock on nothing.
            if os.path.samestat(os.fstat(fd), root.stat()):
                break
        except (BlockingIOError, FileNotFoundError):
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        if time.monotonic() > deadline:
            raise KflexError(
                "another offload start or stop is running", str(root), "wait until it has finished"
            )
        time.sleep(0.02)
    try:
        yield True
    finally:
        os.close(fd)


def _synchronize_rcu() -> None:
    """MEMBARRIER_CMD_GLOBAL is synchronize_rcu() (kernel/sched/membarrier.c)."""
    libc = ctypes.CDLL(None, use_errno=True)
    sys_membarrier = {"x86_64": 324, "aarch64": 283}.get(os.uname().machine, 324)
    if libc.syscall(sys_membarrier, 1, 0, 0) != 0:
        time.sleep(0.1)  # no membarrier here: programs run for microseconds


def _wait_gone(programs: list[int], timeout: float = 3.0) -> None:
    """The kernel frees programs after a grace period: wait, so that whoever looks next sees none."""
    from kflex_repro.bpf import libbpf

    deadline = time.monotonic() + timeout
    for number in programs:
        while time.monotonic() < deadline:
            fd = libbpf.library().bpf_prog_get_fd_by_id(number)
            if fd < 0:
                break
            os.close(fd)
            time.sleep(0.005)
