"""``python -m tests.redis_suite``: Redis's own tests, plain and with the offload, and the differences."""

from __future__ import annotations

import concurrent.futures
import queue
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from kflex_repro import build
from kflex_repro.errors import KflexError
from tests.redis_suite import run
from tests.redis_suite.compare import Comparison, compare, explanations, markdown

QUICK = ("unit/type/string", "unit/multi", "unit/pubsub")
# Where a served client, the events or the AOF can be wrong. Left out: what the offload has no part in
# (functions, geo, streams, cluster, oom scores, TLS) and the fuzzers of corrupt dumps.
SELECTION = (
    *(
        "unit/type/string",
        "unit/type/incr",
        "unit/type/hash",
        "unit/type/list",
        "unit/type/set",
        "unit/type/zset",
    ),
    *("unit/expire", "unit/other", "unit/multi", "unit/scripting", "unit/pubsub", "unit/introspection"),
    *(
        "unit/introspection-2",
        "unit/keyspace",
        "unit/scan",
        "unit/dump",
        "unit/auth",
        "unit/acl",
        "unit/acl-v2",
    ),
    *("unit/protocol", "unit/info", "unit/info-command", "unit/quit", "unit/limits", "unit/networking"),
    *("unit/querybuf", "unit/pendingquerybuf", "unit/obuf-limits", "unit/replybufsize", "unit/tracking"),
    *("unit/client-eviction", "unit/maxmemory", "unit/lazyfree", "unit/hyperloglog", "unit/bitops"),
    *("unit/bitfield", "unit/sort", "unit/slowlog", "unit/latency-monitor", "unit/wait", "unit/pause"),
    *("unit/shutdown", "unit/aofrw", "integration/aof", "integration/aof-multi-part", "integration/rdb"),
    *("integration/replication", "integration/replication-2", "integration/replication-3"),
    *("integration/replication-4", "integration/replication-psync", "integration/replication-buffer"),
    *("integration/block-repl", "integration/failover", "integration/shutdown", "integration/psync2"),
    *("integration/redis-cli", "integration/redis-benchmark", "integration/logging"),
)


def _pairs(
    files: list[str], modes: list[str], jobs: int, reruns: int, out: Path | None, report: Console
) -> list[Comparison]:
    built = build.ensure()
    ports: queue.Queue[int] = queue.Queue()
    for port in run.free_ports(jobs):
        ports.put(port)

    def both(file: str, mode: str) -> Comparison:
        baseport = ports.get()
        try:
            found = compare(file, mode, built, baseport, reruns)
        finally:
            ports.put(baseport)
        if out is not None:
            found.keep(out)
        report.print(str(found))
        return found

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        work = [pool.submit(both, file, mode) for mode in modes for file in files]
        try:
            return [each.result() for each in work]
        except BaseException:
            run.stop()
            pool.shutdown(cancel_futures=True)
            raise


@click.command()
@click.argument("files", nargs=-1)
@click.option("--quick", is_flag=True, help=f"Only {', '.join(QUICK)}, where clients are served.")
@click.option("--everything", is_flag=True, help="All files that the suite has.")
@click.option("--mode", "modes", multiple=True, type=click.Choice(list(run.MODES)), help="Default: all.")
@click.option("--jobs", type=click.IntRange(1, 16), default=1, show_default=True, help="Files at a time.")
@click.option(
    "--reruns", type=click.IntRange(0, 20), default=3, show_default=True, help="Of a file that differs."
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Keep the suite's output here.")
@click.option("--markdown", "as_markdown", is_flag=True, help="The table as docs/redis-suite.md has it.")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON on standard output.")
def main(
    files: tuple[str, ...],
    quick: bool,
    everything: bool,
    modes: tuple[str, ...],
    jobs: int,
    reruns: int,
    out: Path | None,
    as_markdown: bool,
    as_json: bool,
) -> None:
    """Run Redis's own test FILES with a plain redis-server and with the offload, and compare.

    Exit code 1 for a difference that differences.toml does not explain, a promise broken, or nothing served.
    """
    report = Console(stderr=True, highlight=False, soft_wrap=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    known = run.files()
    wanted = list(files or (QUICK if quick else known if everything else SELECTION))
    for file in wanted:
        if file not in known:
            raise KflexError("the suite has no such file", file, "give names like unit/type/string")
    found = _pairs(wanted, list(modes or (["served"] if quick else run.MODES)), jobs, reruns, out, report)
    if as_json:
        click.echo(run.dump([outcome for each in found for outcome in each.runs]))
    elif as_markdown:
        click.echo(markdown(found))
    else:
        Console(highlight=False).print(_table(found))
    served = sum(each.served for each in found)
    problems = [line for each in found for line in each.problems(explanations())]
    for line in problems:
        report.print(line, markup=False)
    report.print(f"{served} requests of the suite's clients were served in the kernel")
    if not served:
        report.print("nothing was served: this compares nothing")
    if problems or not served:
        sys.exit(1)


def _table(found: list[Comparison]) -> Table:
    table = Table("file", "mode", "plain", "offload", "served", "differences")
    for each in found:
        table.add_row(*each.row(), style="" if not each.different else "yellow")
    return table


if __name__ == "__main__":
    try:
        main()
    except KflexError as error:
        click.echo(f"redis-suite: {error}", err=True)
        sys.exit(error.exit_code)
