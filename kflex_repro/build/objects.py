"""vmlinux.h, the BPF objects and the Redis module, each from its sources into the cache."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from kflex_repro.build import cache, toolchain
from kflex_repro.build.libbpf import newest_built
from kflex_repro.errors import KflexError, Unavailable

KERNEL_BTF = Path("/sys/kernel/btf/vmlinux")
MODULE = "kflex.so"
_SYSTEM_HEADERS = Path("/usr/include/bpf")
_OBJECT_SUFFIX = ".bpf.c"

# Part of every key: raise it when a change here makes old outputs wrong.
_FORMAT = "1"

# step name, "start" | "built" | "cached", seconds
Report = Callable[[str, str, float], None]


@dataclass(frozen=True)
class Step:
    """What happened to one output: its path, whether it was built now, in how many seconds, and its log."""

    name: str
    path: Path
    built: bool
    seconds: float
    log: Path | None


@dataclass(frozen=True)
class Built:
    """Everything built from one state of the sources with one set of defines."""

    vmlinux: Path
    objects: Mapping[str, Path]
    module_path: Path | None
    steps: tuple[Step, ...] = field(default=(), compare=False)

    def object(self, name: str) -> Path:
        """The object file of ``bpf/<name>.bpf.c``."""
        if name not in self.objects:
            raise KflexError(
                f"no BPF object {name}", f"there are: {', '.join(sorted(self.objects)) or 'none'}"
            )
        return self.objects[name]

    @property
    def module(self) -> Path:
        """kflex.so, for ``redis-server --loadmodule``."""
        if self.module_path is None:
            raise KflexError("the Redis module was not part of this build")
        return self.module_path


def source_root() -> Path:
    """The checkout with bpf/ and module/: KFLEX_SOURCE, else where this package is (an editable install)."""
    chosen = os.environ.get("KFLEX_SOURCE")
    path = Path(chosen) if chosen else Path(__file__).resolve().parents[2]
    if not (path / "bpf").is_dir():
        raise KflexError(
            "the BPF sources are not there", str(path), "install with pip install -e from a checkout"
        )
    return path


def object_names() -> list[str]:
    """Names of the BPF objects that can be built."""
    return sorted(path.name.removesuffix(_OBJECT_SUFFIX) for path in (source_root() / "bpf").glob("*.bpf.c"))


def _tree(*paths: Path) -> list[bytes]:
    """Names and contents, for a key."""
    parts: list[bytes] = []
    for path in paths:
        parts += [path.name.encode(), path.read_bytes()]
    return parts


def vmlinux(runner: toolchain.Runner, force: bool = False, btf: Path | None = None) -> Step:
    """vmlinux.h of the running kernel, or of another one's ``btf``, keyed by the hash of the BTF."""
    btf = btf or KERNEL_BTF
    if not btf.exists():
        raise Unavailable(
            "the kernel has no BTF",
            str(btf),
            "boot a kernel with CONFIG_DEBUG_INFO_BTF=y (distribution's)",
        )
    started = time.monotonic()
    key = cache.digest([_FORMAT, cache.file_digest(btf)])
    log: Path | None = None

    def build(out: Path) -> None:
        nonlocal log
        log = toolchain.log_path("vmlinux.h", key)
        command: list[str | Path] = [
            toolchain.bpftool().path,
            "btf",
            "dump",
            "file",
            btf,
            "format",
            "c",
        ]
        runner.run("vmlinux.h", command, log, stdout=out / "vmlinux.h")
        if (out / "vmlinux.h").stat().st_size == 0:
            raise toolchain.BuildError("vmlinux.h", "bpftool wrote nothing", log)

    place, built = cache.obtain("vmlinux", key, build, force)
    return Step("vmlinux.h", place / "vmlinux.h", built, time.monotonic() - started, log)


def _define_flags(defines: Mapping[str, str]) -> list[str]:
    return [f"-D{name}={value}" if value else f"-D{name}" for name, value in sorted(defines.items())]


def _compile_object(
    name: str,
    header: Path,
    libbpf: Path | None,
    defines: Mapping[str, str],
    runner: toolchain.Runner,
    force: bool,
) -> Step:
    started = time.monotonic()
    tool, sources = toolchain.clang(), source_root() / "bpf"
    source = sources / f"{name}{_OBJECT_SUFFIX}"
    if libbpf is None and not (_SYSTEM_HEADERS / "bpf_helpers.h").exists():
        libbpf = newest_built()
    helpers = libbpf / "include" / "bpf" if libbpf else _SYSTEM_HEADERS
    if not (helpers / "bpf_helpers.h").exists():
        raise Unavailable(
            "libbpf's headers are not installed",
            str(helpers),
            "apt install libbpf-dev, or build with --libbpf-from-source",
        )
    flags = ["-O2", "-g", "-Wall", "-target", "bpf", "-mcpu=v3", f"-D__TARGET_ARCH_{toolchain.target_arch()}"]
    flags += _define_flags(defines)
    key = cache.digest(
        [
            *(_FORMAT, tool.banner, *flags, cache.file_digest(header)),
            *_tree(source, *sorted(sources.glob("*.h")), *sorted(helpers.glob("bpf_*.h"))),
        ]
    )
    log: Path | None = None

    def build(out: Path) -> None:
        nonlocal log
        log = toolchain.log_path(f"{name}.bpf.o", key)
        include: list[str | Path] = ["-I", sources, "-I", header.parent]
        if libbpf:
            include += ["-I", helpers.parent]
        runner.run(
            f"{name}.bpf.o", [tool.path, *flags, *include, "-c", source, "-o", out / f"{name}.bpf.o"], log
        )

    place, built = cache.obtain("objects", key, build, force)
    return Step(f"{name}.bpf.o", place / f"{name}.bpf.o", built, time.monotonic() - started, log)


def _compile_module(defines: Mapping[str, str], runner: toolchain.Runner, force: bool) -> Step:
    started = time.monotonic()
    tool, top = toolchain.cc(), source_root()
    sources = sorted((top / "module").glob("*.c"))
    headers = [
        path for where in ("bpf", "module", "module/vendor") for path in sorted((top / where).glob("*.h"))
    ]
    flags = ["-std=gnu11", "-O2", "-g", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror"]
    flags += _define_flags(defines)
    key = cache.digest([_FORMAT, tool.banner, *flags, *_tree(*sources, *headers)])
    log: Path | None = None

    def build(out: Path) -> None:
        nonlocal log
        log = toolchain.log_path(MODULE, key)
        include: list[str | Path] = [
            "-I",
            top / "bpf",
            "-I",
            top / "module",
            "-isystem",
            top / "module" / "vendor",
        ]
        runner.run(MODULE, [tool.path, *flags, *include, *sources, "-o", out / MODULE, "-lpthread"], log)
        (out / MODULE).chmod(0o755)

    place, built = cache.obtain("module", key, build, force)
    return Step(MODULE, place / MODULE, built, time.monotonic() - started, log)


def _ignore(step: str, state: str, seconds: float) -> None:
    del step, state, seconds


def ensure(
    defines: Mapping[str, str] | None = None,
    *,
    only: str | None = None,
    force: bool = False,
    jobs: int | None = None,
    libbpf: Path | None = None,
    btf: Path | None = None,
    report: Report = _ignore,
) -> Built:
    """Build what is not in the cache yet, in parallel, and say where everything is.

    ``defines`` are extra -D for objects and module alike (a variant of its own in the cache); ``only`` an
    object's name or ``kflex.so``; ``libbpf`` a directory with include/bpf of another libbpf than the system;
    ``btf`` the BTF of another kernel than the running one.
    BuildError for a failed step, Unavailable for a missing tool.
    """
    defines = dict(defines or {})
    names = object_names()
    with_module = any((source_root() / "module").glob("*.c"))
    if only is not None:
        if only not in (*names, MODULE, "vmlinux.h"):
            raise KflexError(
                f"nothing to build is called {only}", f"there are: {', '.join((*names, MODULE))}"
            )
        names = [name for name in names if name == only]
        with_module = with_module and only == MODULE
    runner = toolchain.Runner()

    def step(name: str, work: Callable[[], Step]) -> Step:
        report(name, "start", 0.0)
        done = work()
        report(name, "built" if done.built else "cached", done.seconds)
        return done

    header = step("vmlinux.h", lambda: vmlinux(runner, force, btf)) if only != MODULE else None
    pool = ThreadPoolExecutor(max_workers=jobs or os.cpu_count() or 1)
    futures: dict[str, Future[Step]] = {}
    try:
        for name in names:
            assert header is not None
            path = header.path

            def compile_one(name: str = name, path: Path = path) -> Step:
                return _compile_object(name, path, libbpf, defines, runner, force)

            futures[name] = pool.submit(step, f"{name}.bpf.o", compile_one)
        if with_module:
            futures[MODULE] = pool.submit(step, MODULE, lambda: _compile_module(defines, runner, force))
        wait(futures.values(), return_when=FIRST_EXCEPTION)
        failed = [future for future in futures.values() if future.done() and future.exception()]
        if failed:
            runner.stop()
        for future in failed:
            future.result()
    except BaseException:
        runner.stop()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    steps = {name: future.result() for name, future in futures.items()}
    return Built(
        vmlinux=header.path if header else Path(),
        objects={name: steps[name].path for name in names},
        module_path=steps[MODULE].path if with_module else None,
        steps=(*([header] if header else []), *steps.values()),
    )
