"""Runs resp-benchmark in a process of its own: ``python -m kflex_repro.bench.resp_worker SPEC`` (see
load.py).

Its Rust core cannot be interrupted from Python, so only a process can be stopped or timed out.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> int:
    spec = json.loads(sys.argv[1])
    try:
        from resp_benchmark import Benchmark
    except ImportError as error:
        print(f"resp-benchmark is not installed ({error}): run `make setup`", file=sys.stderr)
        return 3
    allowed = sorted(os.sched_getaffinity(0))
    cores = allowed[: spec["threads"]]
    benchmark = Benchmark(host=spec["host"], port=spec["port"], cores=",".join(str(core) for core in cores))
    print("ready", flush=True)
    if not sys.stdin.readline():
        return 1
    result = benchmark.bench(
        command=spec["script"],
        connections=spec["connections"],
        pipeline=spec["pipeline"],
        seconds=spec["seconds"],
        # Its progress lines say how many requests there were (see load.py).
        quiet=False,
        use_lua=True,
    )
    outcome = {
        "ops": round(result.qps * spec["seconds"]),
        "rps": result.qps,
        "p50_ms": None,
        "p99_ms": result.p99_latency_ms,
        "p999_ms": None,
    }
    print(json.dumps(outcome), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
