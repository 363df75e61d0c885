"""The burst: clients that send nothing but passing commands for a second, beside a steady load of GETs."""

from __future__ import annotations

import time
from collections.abc import Callable

from kflex_repro.bench.load import Child, Job, Running, Target, redis_benchmark_argv
from kflex_repro.bench.stats import ShareSample

BURST_START_S = 2.0
BURST_LENGTH_S = 1.0
BURST_CLIENTS = 20
WATCH_AFTER_S = 3.0
WINDOW_S = 0.05


def run_burst(
    running: Running, target: Target, count: Callable[[], tuple[int, int]] | None
) -> tuple[tuple[ShareSample, ...], tuple[float, float]]:
    """Send the burst beside ``running`` (which has begun) and watch what the kernel serves.

    ``count`` returns the requests served in the kernel and passed to Redis so far; None: nothing to watch
    (plain Redis). Returns the samples, one per 50 ms, and when the burst began and ended, in seconds from
    now.
    """
    # Far more requests than a second can hold: it is ended by us.
    job = Job("INCR", (), BURST_CLIENTS, 1, 1, 1, 1, "uniform", BURST_LENGTH_S)
    argv = redis_benchmark_argv(job, target, 50_000_000)
    samples: list[ShareSample] = []
    start = time.monotonic()
    last = count() if count else (0, 0)
    child: Child | None = None
    began = ended = 0.0
    due = start
    try:
        while True:
            now = time.monotonic() - start
            if child is None and now >= BURST_START_S:
                child = Child(argv, target)
                began = time.monotonic() - start
            elif child is not None and not ended and now >= began + BURST_LENGTH_S:
                child.stop()
                ended = time.monotonic() - start
            if ended and now >= ended + WATCH_AFTER_S:
                break
            due += WINDOW_S
            time.sleep(max(0.0, due - time.monotonic()))
            if count:
                current = count()
                t = time.monotonic() - start
                samples.append(ShareSample(t, current[0] - last[0], current[1] - last[1]))
                last = current
    finally:
        if child is not None:
            child.stop()
    return tuple(samples), (began, ended)
