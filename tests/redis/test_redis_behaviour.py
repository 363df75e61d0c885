"""What administrators do to a running Redis, under load: it behaves as it does without the offload.

That a rule stops serving in time is in test_offload_rules.py; here it is what clients, replicas, files and
subscribers see while that happens. The load keeps books: every acknowledged command must be in the data.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kflex_repro.redis.resp import Decoder, ErrorReply
from tests.redis import twin
from tests.redis.durability import (
    Book,
    Load,
    aof_units,
    copy_dataset,
    digest,
    everything,
    incr_file,
    loaded,
    quiesce,
    rings_broken,
)
from tests.redis.harness import Conn, Sut, eventually, offloaded_server, plain_server

pytestmark = pytest.mark.bpf

AOF = ("--appendonly", "yes", "--appendfsync", "no", "--auto-aof-rewrite-percentage", "0")
KEYSPACE = ("notify-keyspace-events", "KEA")


@pytest.fixture
def with_aof() -> Iterator[Sut]:
    with offloaded_server(AOF) as sut:
        yield sut
        assert sut.broken_promises() == {}


def must_hold(book: Book, port: int) -> None:
    """The server holds what the load was told, and nothing else."""
    found = everything(port)
    wrong = book.wrong({**dict.fromkeys(book.known), **found})
    assert not wrong, "\n".join(wrong[:10])
    assert not [key for key in found if key not in book.known]


def info(conn: Conn, section: str, field: str) -> str:
    text = conn.do("INFO", section)
    assert isinstance(text, bytes)
    fields = dict(line.split(":", 1) for line in text.decode().splitlines() if ":" in line)
    return fields[field]


def synchronised(replica: Conn, master: Conn) -> bool:
    """The replica is connected and has all that the master has sent."""
    if info(replica, "replication", "master_link_status") != "up":
        return False
    offset = info(master, "replication", "master_repl_offset")
    return int(info(replica, "replication", "slave_repl_offset")) >= int(offset)


# -- events --


def test_keyspace_events_switched_on_and_off_while_running(offloaded: Sut, plain: Sut) -> None:
    """Subscribers hear of every command, in the order of a plain server; before and after SETs are served."""
    servers = (offloaded, plain)
    for sut in servers:
        with sut.connect() as conn:
            conn.do("FLUSHALL")
    twins = twin.Twins(*servers)
    writer = twin.Writer("events")

    def steps(count: int) -> Iterator[twin.Step]:
        # One message at a time: of several at once the order of events is open.
        made = (step for step in writer.script_of(10**9) if len(step) == 1)
        return (step for step, _ in zip(made, range(count), strict=False))

    for round_ in range(3):
        before = offloaded.stats()["served_set"]
        played = twins.play(steps(120))
        assert not played.difference, str(played)
        if offloaded.offloaded:
            assert offloaded.stats()["served_set"] > before, f"round {round_}"
        listeners = [sut.connect() for sut in servers]
        controls = [sut.connect() for sut in servers]
        for listener, control in zip(listeners, controls, strict=True):
            assert control.do("CONFIG", "SET", *KEYSPACE) == b"OK"
            listener.do("PSUBSCRIBE", "__key*__:*")
        before = offloaded.stats()["served_set"]
        played = twins.play(steps(120))
        assert not played.difference, str(played)
        assert offloaded.stats()["served_set"] == before
        heard = [_events(listener, control) for listener, control in zip(listeners, controls, strict=True)]
        assert len(heard[1]) > 100
        assert heard[0] == heard[1]
        for control in controls:
            assert control.do("CONFIG", "SET", "notify-keyspace-events", "") == b"OK"
    offloaded.hang_up()
    plain.hang_up()


def _events(listener: Conn, control: Conn) -> list[object]:
    """What was heard until now. Not of expiry: Redis finds that out at moments of its own."""
    control.do("PUBLISH", "__keyend__:", "end")
    heard = []
    while True:
        message = listener.read()
        assert isinstance(message, list)
        if message[-1] == b"end":
            return heard
        if b"expired" not in message[2:]:
            heard.append(list(message[1:]))


# -- snapshots and logs --


def test_saves_and_rewrites_under_load(with_aof: Sut, tmp_path: Path) -> None:
    """Again and again BGSAVE and BGREWRITEAOF: each snapshot is a state that existed, the last data are all
    there."""
    control = with_aof.connect()
    with Load(with_aof.port) as load:
        for number in range(3):
            load.run_for(1500)
            assert not isinstance(control.do("BGREWRITEAOF"), ErrorReply)
            eventually(
                lambda: info(control, "persistence", "aof_rewrite_in_progress") == "0", 30, "the rewrite"
            )
            load.run_for(500)
            assert control.do("BGSAVE") == b"Background saving started"
            eventually(lambda: info(control, "persistence", "rdb_bgsave_in_progress") == "0", 30, "the save")
            snapshot = tmp_path / f"snapshot{number}"
            snapshot.mkdir()
            (with_aof.server.dir / "dump.rdb").rename(snapshot / "dump.rdb")
            with plain_server(dir=snapshot) as copy:
                found = everything(copy.port)
                assert found
                assert rings_broken(found) == []
        book = load.stop()
    must_hold(book, with_aof.port)
    expected = quiesce(with_aof.port)
    copy_dataset(with_aof.server.dir, tmp_path)
    with loaded(tmp_path) as replayed:
        assert digest(replayed.port) == expected


ADMINISTRATIVE = (("BGSAVE",), ("BGREWRITEAOF",), ("SAVE",), ("CONFIG", "SET", "save", ""))


def test_the_log_and_the_stream_hold_nothing_but_data(with_aof: Sut) -> None:
    """Commands that fork, and a replica that comes: neither the AOF nor other replicas hear of it."""
    control, stream = with_aof.connect(), with_aof.connect()
    stream.send_bytes(b"SYNC\r\n")
    with Conn(with_aof.port) as writer:
        for number in range(3):
            for command in ADMINISTRATIVE:
                control.do(*command)
                eventually(lambda: info(control, "persistence", "rdb_bgsave_in_progress") == "0", 30)
                eventually(lambda: info(control, "persistence", "aof_rewrite_in_progress") == "0", 30)
            with plain_server() as replica, replica.connect() as copy:
                copy.do("REPLICAOF", "127.0.0.1", str(with_aof.port))
                eventually(lambda copy=copy: synchronised(copy, control), 20, "the replica")
            writer.do("SET", "k", number)
        writer.do("SET", "the", "end")
    names = {
        command[0].upper()
        for _, unit in aof_units(incr_file(with_aof.server.dir).read_bytes())
        for command in unit
    }
    assert names <= {b"SELECT", b"MULTI", b"EXEC", b"SET", b"DEL"}
    assert _stream_until(stream, [b"SET", b"the", b"end"]) <= {b"SELECT", b"MULTI", b"EXEC", b"SET", b"PING"}


def _stream_until(stream: Conn, last: list[bytes]) -> set[bytes]:
    """The names of all commands that a replica is sent up to this one (the snapshot before them is left
    out)."""
    data = b""
    while not data.strip().startswith(b"$") or b"\r\n" not in data.strip():
        data += stream.sock.recv(1 << 16)
    head, _, data = data.lstrip().partition(b"\r\n")
    size = int(head[1:])
    while len(data) < size:
        data += stream.sock.recv(1 << 16)
    names: set[bytes] = set()
    decoder = Decoder()
    decoder.feed(data[size:])
    while True:
        command = decoder.pop()
        if command is Decoder.INCOMPLETE:
            decoder.feed(stream.sock.recv(1 << 16))
            continue
        names.add(command[0].upper())
        if command == last:
            return names


def test_debug_reload_under_load(offloaded: Sut) -> None:
    """The whole keyspace goes and comes again, while SETs and GETs are served."""
    with offloaded.connect() as control:
        control.do("FLUSHALL")
        with Load(offloaded.port) as load:
            for _ in range(6):
                load.run_for(700)
                assert control.do("DEBUG", "RELOAD") == b"OK"
            book = load.stop()
    must_hold(book, offloaded.port)


def test_debug_sleep_under_load(offloaded: Sut) -> None:
    """Everything waits for it, or is served; what was acknowledged before and meanwhile is there."""
    with offloaded.connect() as control:
        control.do("FLUSHALL")
        with Load(offloaded.port) as load:
            for _ in range(5):
                load.run_for(500)
                assert control.do("DEBUG", "SLEEP", "0.1") == b"OK"
            book = load.stop()
    must_hold(book, offloaded.port)


# -- ends --


@pytest.mark.parametrize("kept_by", ["aof", "rdb"])
def test_sigterm_under_load_loses_nothing(kept_by: str, tmp_path: Path) -> None:
    """A clean end of the server: all that was acknowledged until then is in its AOF, or in its snapshot."""
    args = AOF if kept_by == "aof" else ("--save", "3600 1")
    with offloaded_server(args, dir=tmp_path) as sut:
        with Load(sut.port) as load:
            load.run_for(3000)
            sut.server._process.send_signal(signal.SIGTERM)
            eventually(lambda: not sut.server.running, 30, "the server's end")
            book = load.stop()
        if sut.offloaded:
            assert sut.served() > 300
    loader = ("--appendonly", "yes" if kept_by == "aof" else "no")
    with plain_server(loader, dir=tmp_path) as again:
        must_hold(book, again.port)


def test_a_shutdown_that_is_aborted(offloaded: Sut) -> None:
    """SHUTDOWN waits for a replica that lags behind; aborted, the service goes on and nothing was lost."""
    with plain_server() as replica, replica.connect() as copy, offloaded.connect() as control:
        control.do("FLUSHALL")
        control.do("CONFIG", "SET", "shutdown-timeout", "60")
        copy.do("REPLICAOF", "127.0.0.1", str(offloaded.port))
        eventually(lambda: synchronised(copy, control), 20, "the replica")
        with Load(offloaded.port) as load:
            load.run_for(500)
            # A replica that does not read: the master cannot end without it.
            replica.server._process.send_signal(signal.SIGSTOP)
            try:
                with offloaded.connect() as ender:
                    load.run_for(200)
                    ender.send("SHUTDOWN", "NOSAVE")
                    eventually(lambda: control.do("SHUTDOWN", "ABORT") == b"OK", 20, "the abort")
                    assert isinstance(ender.read(), ErrorReply)
            finally:
                replica.server._process.send_signal(signal.SIGCONT)
            load.run_for(500)
            book = load.stop()
        must_hold(book, offloaded.port)
        eventually(lambda: synchronised(copy, control), 20, "the replica")
        assert digest(replica.port) == digest(offloaded.port)
    with offloaded.connect() as conn:
        conn.do("PING")
        offloaded.must_serve(conn, ("SET", "k", "v"))


# -- roles --


def test_becoming_a_replica_and_a_master_again_under_load(offloaded: Sut) -> None:
    """As a replica it holds its master's data, and refuses SETs; as a master it goes on from there."""
    with plain_server() as other, other.connect() as origin, offloaded.connect() as control:
        for round_ in range(3):
            origin.do("FLUSHALL")
            for number in range(20):
                origin.do("SET", f"k{number}", f"{round_}:{number}")
            wrong: list[str] = []
            ends = threading.Event()
            reader = threading.Thread(target=_reads, args=(offloaded.port, round_, ends, wrong))
            reader.start()
            try:
                assert control.do("REPLICAOF", "127.0.0.1", str(other.port)) == b"OK"
                eventually(lambda: synchronised(control, origin), 20, "the data")
                origin.do("SET", "k0", f"{round_}:changed")
                eventually(lambda: synchronised(control, origin), 20, "the change")
                assert control.do("GET", "k0") == b"%d:changed" % round_
                assert isinstance(control.do("SET", "k1", "refused"), ErrorReply)
                assert digest(offloaded.port) == digest(other.port)
                assert control.do("REPLICAOF", "NO", "ONE") == b"OK"
            finally:
                ends.set()
                reader.join()
            assert not wrong, wrong[:5]
            with offloaded.connect() as conn:
                conn.do("PING")
                offloaded.must_serve(conn, ("SET", "k1", f"{round_}:mine"))
                assert control.do("GETRANGE", "k1", 0, -1) == b"%d:mine" % round_


def _reads(port: int, round_: int, ends: threading.Event, wrong: list[str]) -> None:
    """GETs without pause: data go from the last round's to this one's and never back."""
    with Conn(port) as conn:
        newest: dict[int, int] = {}
        while not ends.is_set():
            for number in range(1, 20):
                said = conn.do("GET", f"k{number}")
                if said is None or isinstance(said, ErrorReply):
                    continue
                at = int(bytes(said).partition(b":")[0])
                if at < newest.get(number, 0) or at > round_:
                    wrong.append(f"k{number} is {said!r} after round {newest.get(number)}")
                newest[number] = at


def test_a_replica_loads_beside_its_old_data() -> None:
    """repl-diskless-load swapdb: with a module that knows nothing of it Redis goes by way of the disk."""
    with plain_server() as master, master.connect() as origin:
        origin.do("SET", "k", "from the master")
        with offloaded_server(["--repl-diskless-load", "swapdb"]) as sut, sut.connect() as control:
            control.do("SET", "k", "old")
            sut.warm(control, "k")
            assert control.do("REPLICAOF", "127.0.0.1", str(master.port)) == b"OK"
            eventually(lambda: synchronised(control, origin), 20, "the data")
            assert control.do("GET", "k") == b"from the master"
            log = sut.server.log.read_text()
            assert "Skipping diskless-load" not in log
            assert "receiving streamed RDB from master with EOF to parser" in log
            assert control.do("REPLICAOF", "NO", "ONE") == b"OK"
            sut.must_serve(control, ("GET", "k"))
            assert control.do("GET", "k") == b"from the master"


def test_failover(offloaded: Sut) -> None:
    """FAILOVER hands everything acknowledged to the replica; the old master then follows it."""
    with plain_server() as replica, replica.connect() as copy, offloaded.connect() as control:
        control.do("FLUSHALL")
        copy.do("REPLICAOF", "127.0.0.1", str(offloaded.port))
        with Conn(offloaded.port) as writer:
            for number in range(200):
                assert writer.do("SET", "counter", number) == b"OK"
            eventually(lambda: synchronised(copy, control), 20, "the replica")
            # The master counts it as online only from its first acknowledgement on.
            eventually(
                lambda: "state=online" in info(control, "replication", "slave0"), 20, "the replica online"
            )
            assert control.do("FAILOVER", "TO", "127.0.0.1", str(replica.port)) == b"OK"
            last, number = 199, 200
            while True:
                said = writer.do("SET", "counter", number)
                if isinstance(said, ErrorReply):
                    assert said.code == "READONLY"
                    break
                last, number = number, number + 1
        eventually(lambda: info(copy, "replication", "role") == "master", 20, "the new master")
        assert copy.do("GET", "counter") == b"%d" % last
        copy.do("SET", "counter", "of the new master")
        eventually(lambda: synchronised(control, copy), 20, "the old master as a replica")
        assert control.do("GET", "counter") == b"of the new master"
        assert control.do("REPLICAOF", "NO", "ONE") == b"OK"
    with offloaded.connect() as conn:
        conn.do("PING")
        offloaded.must_serve(conn, ("SET", "counter", "mine"))


def test_maxmemory_set_under_load(offloaded: Sut) -> None:
    """From the moment on in which it is too low every SET is refused, as by a plain server."""
    with offloaded.connect() as control, offloaded.connect() as conn:
        control.do("FLUSHALL")
        assert conn.do("SET", "k", "v") == b"OK"
        offloaded.warm(conn, "k")
        with Load(offloaded.port) as load:
            load.run_for(500)
            book = load.stop()
        assert control.do("CONFIG", "SET", "maxmemory", "1mb") == b"OK"
        for _ in range(50):
            said = conn.do("SET", "k", "too much")
            assert isinstance(said, ErrorReply)
            assert said.code == "OOM"
            assert conn.do("GET", "k") == b"v"
        assert control.do("CONFIG", "SET", "maxmemory", "0") == b"OK"
        assert control.do("DEL", "k") == 1
        must_hold(book, offloaded.port)
