"""The latency programs: loaded for some servers, read as counters and histograms, taken off again."""

from __future__ import annotations

import ctypes
import struct
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from kflex_repro import build
from kflex_repro.bpf import Link, Object, btf, libbpf
from kflex_repro.bpf.maps import possible_cpus
from kflex_repro.errors import KflexError, Unavailable
from kflex_repro.probe.targets import Server

PHASES = ("total", "queue", "exec", "reply")
OTHER = "(other)"
_OBJECT = "latency"
_SOCK = ("kflex_recv", "kflex_send", "kflex_ready")
_SYSCALLS = ("kflex_enter", "kflex_leave")
_MAX_BYTES = 64 << 20
_CONNECTIONS = 16384
_COARSE = 6  # CLOCK_MONOTONIC_COARSE: its resolution is the kernel's tick


@dataclass(frozen=True)
class Options:
    """What to look at. ``commands`` and the key filter everything, ``slower_than`` (ns) events.

    ``key_prefix`` is what keys must begin with, or be if ``key_whole``. ``sample``: one read of so many.
    ``probe``: auto, sock or syscalls. ``ring_bytes``: room for events until they are read, a power of two.
    """

    events: bool = False
    redact: bool = True
    commands: tuple[str, ...] = ()
    key_prefix: bytes = b""
    key_whole: bool = False
    slower_than: int = 0
    sample: int = 1
    probe: str = "auto"
    ring_bytes: int = 8 << 20


@dataclass(frozen=True)
class Histogram:
    """Latencies of one phase: counts by bucket, their exact sum and maximum, ns."""

    counts: tuple[int, ...]
    sum: int
    max: int

    @property
    def count(self) -> int:
        """How many latencies are in it."""
        return sum(self.counts)

    def percentile(self, percent: float) -> float:
        """ns; the middle of the bucket, whose half width is at most 6 % of it; 0 when empty."""
        total = self.count
        if not total:
            return 0.0
        wanted, seen = total * percent / 100, 0
        for index, count in enumerate(self.counts):
            seen += count
            if count and seen >= wanted:
                low, high = bounds(index)
                return min((low + high) / 2, float(self.max)) if self.max else (low + high) / 2
        return float(self.max)

    @property
    def mean(self) -> float:
        """ns, exact."""
        count = self.count
        return self.sum / count if count else 0.0

    def since(self, earlier: Histogram) -> Histogram:
        """What came after ``earlier``; its maximum is the upper end of the last bucket."""
        counts = tuple(a - b for a, b in zip(self.counts, earlier.counts, strict=True))
        top = next((bounds(i)[1] for i in reversed(range(len(counts))) if counts[i]), 0)
        return Histogram(counts, self.sum - earlier.sum, min(top, self.max))


def bounds(index: int, sub_bits: int = 3) -> tuple[int, int]:
    """The lowest value of a bucket and that of the next one, ns."""
    steps = 1 << sub_bits
    if index < 2 * steps:
        return index, index + 1
    shift = (index >> sub_bits) - 1
    low = (steps + (index & steps - 1)) << shift
    return low, low + (1 << shift)


def bucket(value: int, sub_bits: int = 3, buckets: int = 288) -> int:
    """The bucket of a value, as the programs compute it."""
    if value < 1 << sub_bits:
        return max(value, 0)
    shift = value.bit_length() - 1 - sub_bits
    return min(((shift + 1) << sub_bits) + (value >> shift & (1 << sub_bits) - 1), buckets - 1)


def histogram(values: Sequence[int], buckets: int = 288) -> Histogram:
    """Of single latencies, ns."""
    counts = [0] * buckets
    for value in values:
        counts[bucket(value, buckets=buckets)] += 1
    return Histogram(tuple(counts), sum(values), max(values, default=0))


@dataclass(frozen=True)
class Counts:
    """Of one command: see struct kflex_lat_command."""

    calls: int
    answered: int
    errors: int
    bytes_in: int
    bytes_out: int
    untimed: int
    phases: Mapping[str, Histogram]

    def since(self, earlier: Counts) -> Counts:
        """What came after ``earlier``."""
        return Counts(
            self.calls - earlier.calls,
            self.answered - earlier.answered,
            self.errors - earlier.errors,
            self.bytes_in - earlier.bytes_in,
            self.bytes_out - earlier.bytes_out,
            self.untimed - earlier.untimed,
            {name: self.phases[name].since(earlier.phases[name]) for name in PHASES},
        )


@dataclass(frozen=True)
class Snapshot:
    """Everything counted so far, at ``at`` (CLOCK_MONOTONIC, seconds).

    ``missed``: runs of a program that the kernel skipped; ``totals``: struct kflex_lat_totals.
    """

    at: float
    commands: Mapping[str, Counts]
    totals: Mapping[str, int]
    missed: int

    def since(self, earlier: Snapshot) -> dict[str, Counts]:
        """By command, what came after ``earlier``; only commands that came."""
        found = {}
        for name, counts in self.commands.items():
            before = earlier.commands.get(name)
            changed = counts.since(before) if before else counts
            if changed.calls or changed.answered:
                found[name] = changed
        return found


def known_commands(bits: Mapping[str, int]) -> dict[str, int]:
    """Upper-case name -> enum kflex_lat_flag bits, of commands.toml."""
    data = tomllib.loads(files(__package__).joinpath("commands.toml").read_text())
    found: dict[str, int] = {}
    for key, flag in (
        ("shows", "KEY"),
        ("blocks", "BLOCKS"),
        ("subscribes", "SUBSCRIBE"),
        ("streams", "STREAM"),
        ("client", "CLIENT"),
        ("others", ""),
    ):
        for word in data[key].upper().split():
            found[word] = found.get(word, 0) | (bits[f"KFLEX_LAT_F_{flag}"] if flag else 0)
    return found


def possible(name: str) -> bool:
    """Whether the running kernel has the BTF tracepoint ``name``."""
    with libbpf.captured():
        return libbpf.library().libbpf_find_vmlinux_btf_id(name.encode(), libbpf.AttachType.TRACE_RAW_TP) > 0


def choose_probe(wanted: str) -> str:
    """``sock`` or ``syscalls``."""
    has_sock = all(map(possible, ("sock_recv_length", "sock_send_length", "sk_data_ready")))
    if wanted == "sock" and not has_sock:
        raise Unavailable(
            "this kernel has no tracepoints on sockets' reads and writes",
            "--probe sock",
            "needs Linux 6.3: use syscalls",
        )
    return wanted if wanted != "auto" else "sock" if has_sock else "syscalls"


class Probe:
    """Attached as long as it is open. A context manager."""

    def __init__(self, servers: Sequence[Server], options: Options) -> None:
        self.servers = list(servers)
        self.options = options
        self._links: list[Link] = []
        self.kind = choose_probe(options.probe)
        self._object = Object.open(build.ensure(only=_OBJECT).object(_OBJECT))
        try:
            self._prepare()
            self._object.load()
            self._fill()
            self._attach()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        object_, options = self._object, self.options
        self._constants = object_.btf.constants()
        limit = self._constants["KFLEX_LAT_SERVERS"]
        if len(self.servers) > limit:
            raise KflexError(
                f"{len(self.servers)} servers, at most {limit} can be watched at once",
                "monitor",
                "choose some with --port",
            )
        with_unix = any(server.unix for server in self.servers)
        wanted = set(_SOCK if self.kind == "sock" else _SYSCALLS)
        for name, program in object_.programs.items():
            program.set_autoload(name in wanted)
        self._wanted = wanted
        prefix = options.key_prefix
        if len(prefix) >= self._constants["KFLEX_LAT_PREFIX"]:
            raise KflexError(f"a key prefix of {len(prefix)} bytes", "--key", "at most 63 can be compared")
        texts = self._texts() if options.events else 1
        object_.set_rodata(
            servers=len(self.servers),
            ports=_packed("H", [server.port for server in self.servers], limit),
            netns=_packed("I", [server.netns for server in self.servers], limit),
            events=options.events,
            redact=options.redact,
            with_unix=with_unix,
            only_wanted=bool(options.commands),
            sample=options.sample,
            slower_than=options.slower_than,
            text_mask=texts - 1,
            prefix_len=len(prefix),
            prefix_whole=options.key_whole,
            prefix=int.from_bytes(prefix, "little"),
            tick_ns=round(time.clock_getres(_COARSE) * 1e9),
        )
        maps = object_.maps
        maps["texts"].set_max_entries(texts)
        if options.events:
            maps["ring"].set_max_entries(options.ring_bytes)
        slots = _MAX_BYTES // (maps["commands"].value_size * possible_cpus())
        self._slots = max(32, min(slots, self._constants["KFLEX_LAT_SLOTS"]))
        maps["commands"].set_max_entries(self._slots)
        if self.kind == "syscalls":
            maps["conns_by_address"].set_max_entries(_CONNECTIONS)

    def _texts(self) -> int:
        """Requests whose text is kept until they are answered; a power of two."""
        return 4096

    def _fill(self) -> None:
        known = known_commands(self._constants)
        name_type = self._object.btf.struct("kflex_lat_name")
        names = self._object.maps["names"]
        flag = self._constants["KFLEX_LAT_F_WANTED"]
        wanted = {name.upper() for name in self.options.commands}
        for name in {*known, *wanted}:
            text = name.encode()
            if len(text) > ctypes.sizeof(name_type):
                raise KflexError(f"no command has a name that long: {name[:40]}", "--command")
            bits = known.get(name, 0) | (flag if name in wanted else 0)
            names.update(text.ljust(ctypes.sizeof(name_type), b"\0"), struct.pack("<II", 0, bits))
        for index, server in enumerate(self.servers):
            self.set_pid(index, server.pid if server.unix else 0)

    def set_pid(self, index: int, pid: int) -> None:
        """The process whose unix sockets belong to server ``index``."""
        self._object.maps["unix_pids"].update(struct.pack("<I", index), struct.pack("<Q", pid))

    def _attach(self) -> None:
        # Writes before reads: a request whose reply we did not see would wait for the next one's.
        for name in sorted(self._wanted, reverse=True):
            self._links.append(self._object.programs[name].attach())
        self.started = time.monotonic()

    def replace(self, index: int, server: Server) -> None:
        """Another process has the port of server ``index`` now. Its TCP connections are seen anyway."""
        self.servers[index] = server
        if server.unix:
            self.set_pid(index, server.pid)

    # --- reading -------------------------------------------------------------------------------------------

    @property
    def ring_fd(self) -> int:
        """The ring buffer's descriptor."""
        return self._object.maps["ring"].fd

    @property
    def btf(self) -> btf.Btf:
        """The object's types."""
        return self._object.btf

    @property
    def constants(self) -> Mapping[str, int]:
        """The object's constants."""
        return self._constants

    def slots(self) -> dict[int, str]:
        """Slot -> command, of those that came so far."""
        names = self._object.maps["names"]
        found = {0: OTHER}
        for key in names.keys():  # noqa: SIM118 (a BPF map is no dictionary)
            value = names.get(key)
            if value and (slot := struct.unpack_from("<I", value)[0]):
                # A slot beyond the counters is counted with the others.
                found[slot] = key.rstrip(b"\0").decode("latin-1") if slot < self._slots else OTHER
        return found

    def totals(self) -> dict[str, int]:
        """struct kflex_lat_totals."""
        raw = self._object.maps["totals"].get(bytes(4))
        assert raw is not None
        made = self.btf.struct("kflex_lat_totals").from_buffer_copy(raw)
        return {name: int(getattr(made, name)) for name, *_ in made._fields_}

    def snapshot(self) -> Snapshot:
        """All counters now. Requests under way at this moment may be in one and not yet in another."""
        kind = self.btf.struct("kflex_lat_command")
        commands = self._object.maps["commands"]
        found: dict[str, list[Any]] = {}
        at = time.monotonic()
        for slot, name in sorted(self.slots().items()):
            if slot >= self._slots:
                continue
            values = commands.lookup(struct.pack("<I", slot))
            assert isinstance(values, list)
            found[name] = [kind.from_buffer_copy(value) for value in values]
        counts = {name: _merged(parts) for name, parts in found.items()}
        missed = sum(int(self._object.programs[name].info.recursion_misses) for name in self._wanted)
        return Snapshot(at, {name: one for name, one in counts.items() if one.calls}, self.totals(), missed)

    def cost(self) -> dict[str, tuple[int, int]]:
        """Program -> (runs, ns) while libbpf.run_statistics() was on."""
        programs = self._object.programs
        return {name: (programs[name].run_cnt, programs[name].run_time_ns) for name in sorted(self._wanted)}

    def close(self) -> None:
        """Detach. No error twice."""
        links, self._links = self._links, []
        for link in links:
            link.destroy()
        self._object.close()

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _packed(code: str, values: Iterable[int], count: int) -> int:
    """An array for a constant, as the integer that has its bytes."""
    items = list(values)
    items += [0] * (count - len(items))
    return int.from_bytes(struct.pack(f"<{count}{code}", *items), "little")


def _merged(parts: Sequence[Any]) -> Counts:
    """The counters of all CPUs together."""

    def total(name: str) -> int:
        return sum(int(getattr(part, name)) for part in parts)

    phases = {}
    for index, phase in enumerate(PHASES):
        columns = zip(*(part.buckets[index] for part in parts), strict=True)
        phases[phase] = Histogram(
            tuple(sum(column) for column in columns),
            sum(int(part.sum[index]) for part in parts),
            max(int(part.max[index]) for part in parts),
        )
    return Counts(
        total("calls"),
        total("answered"),
        total("errors"),
        total("bytes_in"),
        total("bytes_out"),
        total("untimed"),
        phases,
    )
