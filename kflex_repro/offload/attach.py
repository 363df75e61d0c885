"""Attach the offload to a redis-server."""

from __future__ import annotations

import contextlib
import os
import secrets
import struct
from pathlib import Path

from kflex_repro import build, memory
from kflex_repro.bpf.btf import Btf
from kflex_repro.bpf.libbpf import AttachType
from kflex_repro.bpf.object import Object
from kflex_repro.errors import KflexError, Unavailable
from kflex_repro.offload import adopt, commands, link, netns, places, table, target
from kflex_repro.offload.session import MAPS, OBJECT, UNREAD, VERDICTS, Session, attached, layouts
from kflex_repro.redis.server import known_good

# module/link.c names it.
_DRAIN_THREAD = "kflex-drain"
_DRAIN_NICE = -10


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
        with places.locked(session.pin_dir):
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
    with places.entered() as root:
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
            session.keep_leftovers()
        for session in stale:
            session.discard()
        if same and (found.attached or same[0].mode == mode == "store"):
            same[0].refresh_addresses()
            return same[0]
        if same:
            # Pins without a module behind them: a start that was killed half-way.
            same[0].discard()
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
    ours = layouts(made).constants()["KFLEX_ABI"]
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
        answer = link.require(_query(found, layouts(made)), "talk to this toolkit")
        if size is None and answer.table_size:
            size, where = answer.table_size, f"{found.host}:{found.port}, kflex.table-size"
    free = table.available()
    plan = table.plan(size if size is not None else table.auto(free), where)
    misfit = memory.misfit(f"a table of {memory.amount(plan.bytes)}", plan.bytes, free)
    if misfit:
        raise KflexError(misfit, where, "choose a smaller one")
    return plan


def _start(found: target.Target, pin_dir: Path, plan: table.Plan, mode: str, made: build.Built) -> Session:
    path = made.object(OBJECT)
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
        for name, map_name in VERDICTS:
            obj.programs[name].attach_map(obj.maps[map_name], AttachType.SK_MSG_VERDICT)
        unread = obj.programs[UNREAD].attach_iter(obj.maps["client_socks"])
        unread.pin(pin_dir / UNREAD)
        unread.destroy()
        adopt.pin(obj, pin_dir, refused)
        session.attach_hooks()
        if mode == "coherent":
            fds = [obj.maps[name].fd for name in ("ctl", "heap", "buckets", "ring")]
            answer = link.call(found.run_id, "KFLEX_ATTACH", obj.btf, fds, where=found.where)
            link.require(answer, "attach")
            _hurry(pid)
        return session
    except BaseException:
        (session or Session(pin_dir, obj.btf, obj)).remove()
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
    for name in MAPS:
        obj.maps[name].pin(pin_dir / name)
    for name, _ in VERDICTS:
        obj.programs[name].pin(pin_dir / name)


def _give_to(pin_dir: Path, owner: os.stat_result) -> None:
    """The server's user may open what it has mapped anyway: after a crash its successor must."""
    for name in ("ctl", "heap", "ring"):
        os.chown(pin_dir / name, owner.st_uid, owner.st_gid)
    if owner.st_uid != 0:
        places.open_to_others(pin_dir.parent)


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
