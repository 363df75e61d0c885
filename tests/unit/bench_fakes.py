"""Stand-ins for the benchmark's surroundings: a session, arm runs, a RESP server that can be told to lie."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

from kflex_repro.bench.bed import Bed, Endpoint
from kflex_repro.bench.checker import Checked, Model
from kflex_repro.bench.cpu import CpuCost
from kflex_repro.bench.load import Outcome
from kflex_repro.bench.pair import ArmRun, Count, Pairs
from kflex_repro.bench.result import ScenarioResult
from kflex_repro.bench.scenario import Scenario

RPS = {"baseline": 80_000.0, "unix": 110_000.0, "offload": 200_000.0}


class FakeSession:
    """Counts what is done to it; never serves anything."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def stats(self) -> dict[str, int]:
        return {"served_get": 0, "served_set": 0, "passed": 0}

    def suspend(self) -> None:
        self.calls.append("suspend")

    def resume(self) -> None:
        self.calls.append("resume")

    def reset_max(self) -> None:
        pass

    def stop(self, timeout: float = 10.0) -> None:
        self.calls.append("stop")


class FakeBed(Bed):
    """A bed without servers: filling and deleting are only noted."""

    def __init__(self, unix: str | None = "/x/redis.sock") -> None:
        plain = Endpoint("127.0.0.1", 1, unix, None, "127.0.0.1")
        served = Endpoint("127.0.0.1", 2, unix, None, "127.0.0.1")
        self.fake_session = FakeSession()
        super().__init__(plain, served, self.fake_session, "7.0.15", ())
        self.filled: list[tuple[str, int, int]] = []

    @property
    def on(self) -> bool:
        return self._on

    def fill(self, family: str, keys: int, value_bytes: int) -> None:
        self.filled.append((family, keys, value_bytes))

    def delete(self, keys: object, endpoint: object) -> None:
        pass


def arm_run(arm: str, mismatches: int = 0, factor: float = 1.0, full: bool = True) -> ArmRun:
    """A plausible run of ``arm``; ``full`` False: a driver that reports p99 only."""
    rps = RPS[arm] * factor
    outcome = Outcome(int(rps), rps, 0.4 if full else None, 1.2, 3.0 if full else None)
    served = int(rps * 0.98) if arm == "offload" else None
    return ArmRun(outcome, CpuCost(8.0, 20.0), Checked(100, mismatches, ("GET x: …",) * mismatches), served)


def scenario_result(scenario: Scenario, pairs: int = 3, mismatches: int = 0) -> ScenarioResult:
    """What ``pairs`` plausible pairs give."""
    collected = Pairs(scenario)
    for number in range(pairs):
        full = scenario.driver != "resp-benchmark"
        collected.done.append({arm: arm_run(arm, factor=1 + number / 50, full=full) for arm in scenario.arms})
    collected.checked = Checked(300, mismatches, ("GET k: expected 'a', got 'b'",) * mismatches)
    result = collected.result()
    assert result is not None
    return result


def measure_with(
    log: list[tuple[str, bool]], fail_at: int | None = None, error: BaseException | None = None
) -> Callable[[Bed, Scenario, str, float, float, Count], ArmRun]:
    """A stand-in for pair.measure that notes ``(arm, hooks on)`` and raises ``error`` at call ``fail_at``."""

    def measure(
        bed: Bed, scenario: Scenario, arm: str, seconds: float, expected_rps: float, count: Count
    ) -> ArmRun:
        if fail_at is not None and len(log) == fail_at:
            raise error or KeyboardInterrupt
        assert isinstance(bed, FakeBed)
        log.append((arm, bed.on))
        run = arm_run(arm)
        count(run.checked)
        return run

    return measure


class FakeRedis:
    """A RESP server over the checker's own model; ``lie(args, answer)`` may replace an answer (raw bytes)."""

    def __init__(self, lie: Callable[[list[bytes], bytes | None], bytes | None] | None = None) -> None:
        self._lie = lie or (lambda _args, answer: answer)
        self._model, self._lock = Model(), threading.Lock()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        self._threads: list[threading.Thread] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> FakeRedis:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        file = connection.makefile("rb")
        with connection:
            while line := file.readline():
                args = []
                for _ in range(int(line[1:])):
                    length = int(file.readline()[1:])
                    args.append(file.read(length + 2)[:-2])
                with self._lock:
                    answer = self._answer(args)
                if answer is None:
                    raw = b"$-1\r\n"
                elif args[0] == b"GET":
                    raw = b"$%d\r\n%s\r\n" % (len(answer), answer)
                else:
                    raw = answer + b"\r\n"
                connection.sendall(raw)

    def _answer(self, args: list[bytes]) -> bytes | None:
        if args[0] == b"PING":
            return b"+PONG"
        if args[0] == b"DEL" and len(args) > 2:
            for key in args[1:]:
                self._model.apply([b"DEL", key])
            return b":0"
        return self._lie(args, self._model.apply(args))
