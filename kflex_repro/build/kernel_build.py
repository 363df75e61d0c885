"""Building a kernel: resumable, with an estimate of what is left; the outputs become a cache entry.

Until it is done, source and objects lie in the cache under ``kernel-work/<key>/``, by source and
configuration: a build that was interrupted or killed goes on where it was. Then only the outputs stay, in
``kernel/<key>/``::

    image  config  System.map  release  btf  build.json  [modules/lib/modules/RELEASE/]
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from elftools.elf.elffile import ELFFile

from kflex_repro.build import cache, kernel_needs, toolchain
from kflex_repro.build.kernel_config import Config
from kflex_repro.build.kernel_source import Arch, Tree
from kflex_repro.build.packages import Report

KIND = "kernel"
_WORK = "kernel-work"
_RECORD = "build.json"
# Measured: objects of the default set, 6.12 on x86-64, by the options that are on. Only for a first build.
_OBJECTS_PER_OPTION = 1.82
# A line that stands for an object made: "  CC      mm/slub.o", "  CC [M]  fs/…", "  AS      arch/…".
_MADE = re.compile(r"\s+(?:CC|AS)(?: \[M\])?\s+(\S+\.o)$")


@dataclass(frozen=True)
class Progress:
    """Where a build is: objects made of about ``total``; ``left`` seconds, None while that cannot be said."""

    done: int
    total: int
    left: float | None
    line: str


@dataclass(frozen=True)
class Record:
    """What is kept about a build, for the next one's estimate and for people."""

    release: str
    version: str
    arch: str
    origin: str
    base: str
    fragments: tuple[str, ...]
    options: int
    objects: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """A build: its key, whether its outputs are there, the objects an earlier start left, and the space."""

    tree: Tree
    arch: Arch
    config: Config
    key: str
    path: Path
    cached: bool
    objects: int
    there: int
    space: int


@dataclass(frozen=True)
class Built:
    """A kernel in the cache. ``seconds`` are this run's, ``log`` None where nothing was done."""

    path: Path
    record: Record
    built: bool
    seconds: float
    log: Path | None


def plan(tree: Tree, arch: Arch, config: Config) -> Plan:
    """What building this would be; nothing is done."""
    key = cache.digest([tree.key, arch.name, config.text])
    path = cache.root() / KIND / key
    work = _work(key)
    there = len(_made(key))
    total = max(_expected(arch, config.options), there)
    unpacked = not tree.packed or (work / "source").exists()
    needed = kernel_needs.space(total, there, unpacked)
    return Plan(tree, arch, config, key, path, cache.intact(path), total, there, needed)


def record_of(path: Path) -> Record | None:
    """The record of a kernel in the cache; None where it has none that can be read."""
    try:
        data = json.loads((path / _RECORD).read_text())
        return Record(**{**data, "fragments": tuple(data["fragments"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _work(key: str) -> Path:
    return cache.root() / _WORK / key


def _log(key: str) -> Path:
    return cache.root() / "logs" / f"kernel-{key[:12]}.log"


def _made(key: str) -> set[str]:
    """The objects made so far, as the log has them: it is kept as long as the object tree."""
    if not _work(key).exists():
        return set()
    with contextlib.suppress(OSError), _log(key).open(errors="replace") as lines:
        return {match.group(1) for match in map(_MADE.match, lines) if match}
    return set()


def _expected(arch: Arch, options: int) -> int:
    """About how many objects so many options make: as in the most alike build so far, or as measured."""
    known = [record_of(path) for path in (cache.root() / KIND).glob("[!.]*")]
    alike = [record for record in known if record and record.arch == arch.name and record.options]
    if not alike:
        return round(options * _OBJECTS_PER_OPTION)
    best = min(alike, key=lambda record: abs(record.options - options))
    return round(best.objects * options / best.options)


class _Meter:
    """Turns the lines of a build into its progress."""

    def __init__(self, made: set[str], total: int, show: Callable[[Progress], None]) -> None:
        self._started, self._before, self._total, self._show = time.monotonic(), len(made), total, show
        self.made = made

    def line(self, line: str) -> None:
        if match := _MADE.match(line):
            self.made.add(match.group(1))
        done = len(self.made)
        left = remaining(done - self._before, self._total - done, time.monotonic() - self._started)
        self._show(Progress(done, max(self._total, done), left, line.strip()))


def remaining(done: int, to_do: int, elapsed: float) -> float | None:
    """Seconds for what is to do at the rate so far; None while that is a guess."""
    if done < 20 or elapsed < 5:
        return None
    return max(to_do, 0) * elapsed / done


def build(
    what: Plan,
    runner: toolchain.Runner,
    jobs: int | None = None,
    force: bool = False,
    show: Callable[[Progress], None] = lambda _progress: None,
    report: Report = lambda _line: None,
) -> Built:
    """Build it, or find it in the cache. BuildError names the first error, and the log that is kept."""
    started = time.monotonic()
    log, work = _log(what.key), _work(what.key)

    def make(out: Path) -> None:
        if force:
            shutil.rmtree(work, ignore_errors=True)
        _forget_others(what)
        # Another process may have got further since the plan was made.
        now = plan(what.tree, what.arch, what.config)
        kernel_needs.demand_space(now.space)
        if not work.exists():
            log.unlink(missing_ok=True)
        source = _prepare(what, work, runner, log)
        meter = _Meter(_made(what.key), now.objects, show)
        _compile(what, source, work / "objects", runner, log, jobs, meter)
        report("keeping the outputs")
        _keep(what, source, work / "objects", out, runner, log)
        _write_record(what, out, len(meter.made), _spent(work, time.monotonic() - started))

    try:
        path, fresh = cache.obtain(KIND, what.key, make, force)
    except BaseException:
        with contextlib.suppress(OSError):
            _spent(work, time.monotonic() - started)
        raise
    if fresh:
        with cache.unused(f"{KIND}-{what.key}") as free:
            if free:
                shutil.rmtree(work, ignore_errors=True)
    record = record_of(path)
    assert record is not None, "an intact entry has its record"
    return Built(path, record, fresh, time.monotonic() - started, log if fresh else None)


def _spent(work: Path, seconds: float) -> float:
    """Add to the seconds that this build took so far, over all its starts, and return them."""
    note = work / "seconds"
    before = float(note.read_text()) if note.exists() else 0.0
    note.write_text(f"{before + seconds:.1f}")
    return before + seconds


def _forget_others(what: Plan) -> None:
    """Remove what other unfinished builds of the same tree left: each takes gigabytes."""
    for other in (cache.root() / _WORK).glob("*"):
        if other.name == what.key:
            continue
        with cache.unused(f"{KIND}-{other.name}") as free:
            origin = other / "origin"
            if free and (not origin.exists() or origin.read_text() == _origin(what)):
                shutil.rmtree(other, ignore_errors=True)


def _origin(what: Plan) -> str:
    return f"{what.tree.origin} {what.arch.name}"


def _prepare(what: Plan, work: Path, runner: toolchain.Runner, log: Path) -> Path:
    """The whole source, and an object tree with the configuration in it."""
    objects = work / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    (work / "origin").write_text(_origin(what))
    source = work / "source"
    if not source.exists():
        # Under its name only when all of it is there.
        partial = work / "source.partial"
        shutil.rmtree(partial, ignore_errors=True)
        place = what.tree.whole(runner, partial, log)
        if place == partial:
            partial.rename(source)
        else:
            source = place
    config = objects / ".config"
    # Rewritten, it would have make look at every object again.
    if not config.exists() or config.read_text() != what.config.text:
        config.write_text(what.config.text)
    return source


def _command(what: Plan, source: Path, objects: Path) -> list[str | Path]:
    command: list[str | Path] = ["make", "-C", source, f"O={objects}", *what.arch.variables]
    # Empty, but set: the state of somebody's git tree does not go into the release.
    return [*command, "LOCALVERSION=", "KBUILD_BUILD_USER=kflex-repro", "KBUILD_BUILD_HOST=kflex-repro"]


def _compile(
    what: Plan,
    source: Path,
    objects: Path,
    runner: toolchain.Runner,
    log: Path,
    jobs: int | None,
    meter: _Meter,
) -> None:
    targets = [what.arch.target, *(["modules"] if what.config.values.get("MODULES") == "y" else [])]
    command = [*_command(what, source, objects), f"-j{jobs or os.cpu_count() or 1}", *targets]
    runner.run("the kernel", command, log, watch=meter.line)


def _keep(
    what: Plan,
    source: Path,
    objects: Path,
    out: Path,
    runner: toolchain.Runner,
    log: Path,
) -> None:
    """Copy what stays into the entry."""
    made = {
        "image": objects / what.arch.image,
        "System.map": objects / "System.map",
        "config": objects / ".config",
        "release": objects / "include/config/kernel.release",
    }
    for name, path in made.items():
        if not path.exists():
            raise toolchain.BuildError("the kernel", f"make left no {path.relative_to(objects)}", log)
        shutil.copyfile(path, out / name)
    values = what.config.values
    if values.get("DEBUG_INFO_BTF") == "y":
        with (objects / "vmlinux").open("rb") as stream:
            section = ELFFile(stream).get_section_by_name(".BTF")
            if section is None:
                raise toolchain.BuildError("the kernel", "its vmlinux has no BTF", log)
            (out / "btf").write_bytes(section.data())
    if values.get("MODULES") == "y":
        release = (out / "release").read_text().strip()
        settings = (f"INSTALL_MOD_PATH={out / 'modules'}", "INSTALL_MOD_STRIP=1", "modules_install")
        runner.run("the kernel's modules", [*_command(what, source, objects), *settings], log)
        for link in ("build", "source"):
            (out / "modules/lib/modules" / release / link).unlink(missing_ok=True)


def _write_record(what: Plan, out: Path, objects: int, seconds: float) -> None:
    tree, config = what.tree, what.config
    release = (out / "release").read_text().strip()
    record = Record(
        release,
        tree.version,
        what.arch.name,
        tree.origin,
        config.base,
        config.fragments,
        config.options,
        objects,
        round(seconds, 1),
    )
    (out / _RECORD).write_text(json.dumps(asdict(record), indent=1) + "\n")
