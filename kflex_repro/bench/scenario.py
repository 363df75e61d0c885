"""Scenarios are data (``bench/scenarios.toml``): what to run, and the ratio each one is expected to reach."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from kflex_repro.errors import KflexError

DRIVERS = ("redis-benchmark", "resp-benchmark", "fixed-rate", "burst")
OPS = ("GET", "SET", "INCR", "LPUSH", "MIX")
MIX_OPS = ("GET", "SET", "INCR")
PATHS = ("local", "remote")
MODES = ("coherent", "store")
DISTRIBUTIONS = ("uniform", "zipfian")

# A floor must be reached or passed; a ceiling must not be passed. Everything is a ratio to plain Redis over
# TCP except rps_unix (to the unix socket) and the two that carry a unit in their name.
FLOORS = ("rps", "rps_unix")
CEILINGS = ("p99", "server_cpu", "system_cpu", "recovery_s", "set_in_redis_ms")


@dataclass(frozen=True)
class Scenario:
    """One row of the benchmark.

    ``value_bytes`` in bytes, ``rate`` in requests/s (0: closed loop), ``mix`` in percent; ``aof``: both
    servers with appendonly yes, appendfsync everysec.
    """

    name: str
    about: str
    op: str
    mix: tuple[tuple[str, int], ...] = ()
    driver: str = "redis-benchmark"
    path: str = "local"
    mode: str = "coherent"
    aof: bool = False
    clients: int = 50
    client_threads: int = 2
    value_bytes: int = 64
    pipeline: int = 1
    keys: int = 100_000
    distribution: str = "uniform"
    rate: int = 0
    peers: tuple[str, ...] = ()
    quick: bool = False
    targets: Mapping[str, float] = field(default_factory=dict)

    @property
    def arms(self) -> tuple[str, ...]:
        """What is run in one pair, in the order of an even pair."""
        return ("baseline", *self.peers, "offload")

    @property
    def mix_label(self) -> str | None:
        """``90:10`` for a GET:SET mix, ``89:10:1`` for GET:SET:INCR; None for a single command."""
        return ":".join(str(share) for _, share in self.mix) if self.mix else None

    def share(self, op: str) -> float:
        """The fraction (0 to 1) of the requests that are ``op``."""
        if self.mix:
            return dict(self.mix).get(op, 0) / 100
        return 1.0 if self.op == op else 0.0


@dataclass(frozen=True)
class Emulation:
    """What is run on an emulated CPU: names of scenarios; pairs and seconds where none are asked for; upper
    bounds of clients, keys and rate (1/s).
    """

    scenarios: tuple[str, ...]
    quick: tuple[str, ...]
    pairs: int
    seconds: float
    quick_seconds: float
    clients: int
    keys: int
    rate: int

    def fit(self, scenario: Scenario) -> Scenario:
        """``scenario``, small enough, and without expectations."""
        return replace(
            scenario,
            clients=min(scenario.clients, self.clients),
            keys=min(scenario.keys, self.keys),
            rate=min(scenario.rate, self.rate),
            targets={},
        )


def data_dir() -> Path:
    """Where scenarios.toml and reference.toml are: ``bench`` in KFLEX_SOURCE, else in our source tree."""
    chosen = os.environ.get("KFLEX_SOURCE")
    return (Path(chosen) if chosen else Path(__file__).resolve().parents[2]) / "bench"


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file; a missing or malformed one is a KflexError naming the file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise KflexError(
            f"cannot read {path.name}, {error.strerror}",
            str(path),
            "install with pip install -e from a checkout, or set KFLEX_SOURCE to one",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise KflexError(f"{path.name} is not valid TOML, {error}", str(path)) from error


def _check(condition: bool, name: str, what: str, path: Path) -> None:
    if not condition:
        raise KflexError(f"scenario {name!r}: {what}", str(path))


def _parse(raw: Mapping[str, Any], defaults: Mapping[str, Any], path: Path) -> Scenario:
    merged: dict[str, Any] = {**defaults, **raw}
    name = str(merged.get("name", "?"))
    known = {f.name for f in fields(Scenario)}
    _check(not set(merged) - known, name, f"unknown entries {sorted(set(merged) - known)}", path)
    _check({"name", "about", "op"} <= set(merged), name, "needs name, about and op", path)

    mix = merged.get("mix", {})
    merged["mix"] = tuple((str(op), int(share)) for op, share in dict(mix).items())
    merged["targets"] = {str(key): float(value) for key, value in dict(merged.get("targets", {})).items()}
    if "peers" not in merged:
        # The socket is what a co-located user would pick instead, so it is measured wherever the driver can.
        unix = merged.get("driver", "redis-benchmark") in ("redis-benchmark", "fixed-rate")
        local = merged.get("path", "local") == "local"
        merged["peers"] = ("unix",) if unix and local else ()
    merged["peers"] = tuple(merged["peers"])
    scenario = Scenario(**merged)

    _check(scenario.driver in DRIVERS, name, f"driver {scenario.driver!r} is none of {DRIVERS}", path)
    _check(scenario.op in OPS, name, f"op {scenario.op!r} is none of {OPS}", path)
    _check(scenario.path in PATHS, name, f"path {scenario.path!r} is none of {PATHS}", path)
    _check(scenario.mode in MODES, name, f"mode {scenario.mode!r} is none of {MODES}", path)
    _check(scenario.distribution in DISTRIBUTIONS, name, f"distribution {scenario.distribution!r}", path)
    _check((scenario.op == "MIX") == bool(scenario.mix), name, "MIX needs mix, and only MIX does", path)
    if scenario.mix:
        _check(sum(share for _, share in scenario.mix) == 100, name, "mix must add up to 100", path)
        _check(all(op in MIX_OPS for op, _ in scenario.mix), name, f"mix knows only {MIX_OPS}", path)
        _check(scenario.driver == "resp-benchmark", name, "a mix needs driver resp-benchmark", path)
    for key in ("clients", "client_threads", "value_bytes", "pipeline", "keys"):
        _check(getattr(scenario, key) > 0, name, f"{key} must be positive", path)
    _check((scenario.driver == "fixed-rate") == (scenario.rate > 0), name, "fixed-rate needs a rate", path)
    _check(set(scenario.peers) <= {"unix"}, name, f"peers {scenario.peers}: only unix is known", path)
    unknown = set(scenario.targets) - set(FLOORS) - set(CEILINGS)
    _check(not unknown, name, f"unknown targets {sorted(unknown)}", path)
    return scenario


def load_scenarios(path: Path | None = None) -> tuple[Scenario, ...]:
    """Every scenario of the file, in its order; raises KflexError naming the entry that is wrong."""
    path = path or data_dir() / "scenarios.toml"
    document = read_toml(path)
    scenarios = tuple(_parse(raw, document.get("defaults", {}), path) for raw in document.get("scenario", ()))
    names = [scenario.name for scenario in scenarios]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise KflexError(f"scenarios named twice: {', '.join(twice)}", str(path))
    if not scenarios:
        raise KflexError("no scenario in the file", str(path))
    return scenarios


def load_emulation(path: Path | None = None) -> Emulation:
    """The [emulation] of the file; raises KflexError for what is wrong with it."""
    path = path or data_dir() / "scenarios.toml"
    raw = read_toml(path).get("emulation")
    names = {one.name for one in fields(Emulation)}
    if not isinstance(raw, dict) or set(raw) != names:
        raise KflexError(f"[emulation] needs {', '.join(sorted(names))}", str(path))
    known = {scenario.name for scenario in load_scenarios(path)}
    if unknown := sorted({*raw["scenarios"], *raw["quick"]} - known):
        raise KflexError(f"[emulation] names no scenario of the file: {', '.join(unknown)}", str(path))
    return Emulation(**{**raw, "scenarios": tuple(raw["scenarios"]), "quick": tuple(raw["quick"])})


def select(
    scenarios: Sequence[Scenario], names: Iterable[str] = (), *, quick: bool = False, netns: bool = False
) -> tuple[Scenario, ...]:
    """The scenarios to run, in file order.

    ``names`` (exact, or a prefix ending in ``*``) picks them by name; without names all are run, or the
    quick ones, and those over veth only if ``netns`` allows building a namespace. Raises KflexError (exit
    code 2) for a name that matches nothing, and for a veth scenario asked for by name without ``netns``.
    """
    wanted = list(names)
    if not wanted:
        chosen = [s for s in scenarios if s.quick] if quick else list(scenarios)
        return tuple(s for s in chosen if netns or s.path == "local")
    picked: set[str] = set()
    for pattern in wanted:
        if pattern.endswith("*"):
            hits = {s.name for s in scenarios if s.name.startswith(pattern[:-1])}
        else:
            hits = {s.name for s in scenarios if s.name == pattern}
        if not hits:
            raise KflexError(
                f"no scenario {pattern!r}", fix="`kflex-repro bench redis --list` shows them", exit_code=2
            )
        picked |= hits
    chosen = [s for s in scenarios if s.name in picked]
    remote = [s.name for s in chosen if s.path == "remote"]
    if remote and not netns:
        raise KflexError(
            f"scenario {remote[0]} runs its client in a network namespace", fix="add --netns", exit_code=2
        )
    return tuple(chosen)


# Seconds around each measured run: starting the load generator, reading counters, checking that the table
# is warm.
OVERHEAD_S = 0.9
CALIBRATION_S = 1.2
PREPARE_S = 2.0
BURST_RUN_S = 7.0


# How much longer those take on an emulated CPU.
EMULATED_OVERHEAD = 3.0


def estimate(scenarios: Sequence[Scenario], pairs: int, seconds: float, *, emulated: bool = False) -> float:
    """Wall-clock seconds the run will take, roughly (within 20 % on an idle machine)."""
    more = EMULATED_OVERHEAD if emulated else 1.0
    total = 3.0 * more if scenarios else 0.0
    for scenario in scenarios:
        arms = len(scenario.arms)
        run = BURST_RUN_S if scenario.driver == "burst" else seconds
        calibrated = arms if scenario.driver == "redis-benchmark" else 0
        total += more * (PREPARE_S + calibrated * CALIBRATION_S)
        total += pairs * arms * (run + more * OVERHEAD_S)
    return total
