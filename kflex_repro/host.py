"""Facts about this machine, each found by a real probe; what they are for, how to get what is missing.

``facts()`` are the rows of ``kflex-repro doctor``; ``fact(key)`` is one of them; ``summary()`` is what a
result records about the machine. Probes run once in a process and leave nothing behind.
"""

from __future__ import annotations

import errno
import functools
import importlib.util
import os
import platform
import re
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from kflex_repro import capabilities, memory
from kflex_repro.bpf import fs, libbpf, probe
from kflex_repro.build import cache, toolchain
from kflex_repro.build.objects import KERNEL_BTF
from kflex_repro.errors import KflexError
from kflex_repro.patience import cpu_model, emulated
from kflex_repro.redis import server

State = Literal["ok", "degraded", "missing"]

_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21, "CAP_PERFMON": 38, "CAP_BPF": 39}


@dataclass(frozen=True)
class Fact:
    """One row: ``value`` is what was found, ``purpose`` what needs it, ``fix`` how to get it ("" when ok).

    ``required`` facts are those without which the default job (offload and benchmark) cannot run; those
    ``of_kernel`` are about the running kernel and what it allows us: a VM has its own.
    """

    key: str
    title: str
    state: State
    value: str
    purpose: str
    fix: str
    required: bool
    needs_root: bool
    of_kernel: bool = False


@dataclass(frozen=True)
class _Finding:
    state: State
    value: str
    fix: str = ""


@dataclass(frozen=True)
class _Row:
    key: str
    title: str
    purpose: str
    find: Callable[[], _Finding]
    required: bool = False
    needs_root: bool = False
    of_kernel: bool = False


def _ok(value: str) -> _Finding:
    return _Finding("ok", value)


def is_root() -> bool:
    """Whether this process has root's user id."""
    return os.geteuid() == 0


# --- the kernel -------------------------------------------------------------------------------------------


def _release() -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", platform.release())
    return (int(match.group(1)), int(match.group(2))) if match else (0, 0)


def _kernel() -> _Finding:
    value, fix = platform.release(), "boot the distribution's kernel 6.1 or newer"
    if _release() >= (6, 1):
        return _ok(value)
    return _Finding("degraded" if _release() >= (5, 15) else "missing", value, fix)


def _arch() -> _Finding:
    machine = platform.machine()
    if machine == "x86_64":
        return _ok(machine)
    return _Finding("missing", machine, "the gate reads x86-64 system call numbers: use an x86-64 machine")


def _btf() -> _Finding:
    try:
        with KERNEL_BTF.open("rb") as stream:
            if stream.read(2) == b"\x9f\xeb":
                return _ok(f"{KERNEL_BTF}, {KERNEL_BTF.stat().st_size / 1e6:.1f} MB")
            return _Finding("missing", f"{KERNEL_BTF} is no BTF", "boot the distribution's kernel")
    except OSError as error:
        return _Finding("missing", error.strerror or "", "boot a kernel with CONFIG_DEBUG_INFO_BTF=y")


def _jit() -> _Finding:
    path = Path("/proc/sys/net/core/bpf_jit_enable")
    try:
        value = path.read_text().strip()
    except OSError:
        return _Finding("degraded", "not shown", "run as root in the first network namespace to see it")
    if value == "0":
        return _Finding("degraded", "off", "sysctl net.core.bpf_jit_enable=1")
    return _ok("on")


def _from_probe(run: Callable[[], str], optional: bool) -> Callable[[], _Finding]:
    def find() -> _Finding:
        if not is_root():
            return _Finding("missing", "not probed", "run as root")
        try:
            return _ok(run())
        except KflexError as error:
            fix = error.fix or "boot the distribution's kernel 6.1 or newer"
            if error.errno == errno.EPERM:
                fix = (
                    "this host refuses it, even to root: a container, a security module, or how it was set up"
                )
            return _Finding("degraded" if optional else "missing", error.what, fix)

    return find


def _cgroup2() -> _Finding:
    root = fs.cgroup2_root()
    if root is None:
        return _Finding("missing", "not mounted", "mount -t cgroup2 none /sys/fs/cgroup/unified")
    hybrid = "" if root == Path("/sys/fs/cgroup") else " (hybrid: beside cgroup v1)"
    return _ok(f"{root}{hybrid}")


def _file_system(fstype: str, point: str, auto: bool) -> Callable[[], _Finding]:
    def find() -> _Finding:
        found = fs.mounts(fstype)
        if auto:
            found = [path for path in found if path == Path(point)]
        if found:
            return _ok(str(found[0]))
        known = Path("/proc/filesystems").read_text().split()
        if fstype not in known:
            return _Finding("missing", "unknown to the kernel", "boot the distribution's kernel")
        if auto:
            return _ok(f"not mounted: offload start mounts it at {point}")
        return _Finding("degraded", "not mounted", f"mount -t {fstype} {fstype} {point}")

    return find


def _va_bits() -> _Finding:
    try:
        bits = memory.va_bits()
    except KflexError as error:
        return _Finding("degraded", error.what, error.fix)
    if platform.machine() != "x86_64":
        return _ok(f"{bits} bits of user space")
    in_cpu = bool(re.search(r"^flags\s*:.*\bla57\b", Path("/proc/cpuinfo").read_text(), re.M))
    levels = (
        "5-level paging (LA57)" if bits == 56 else "4-level paging" + (", LA57 in the CPU" if in_cpu else "")
    )
    return _ok(f"{bits} bits of user space, {levels}")


def _lockdown() -> _Finding:
    try:
        text = Path("/sys/kernel/security/lockdown").read_text()
    except OSError:
        return _ok("none")
    mode = re.search(r"\[(\w+)\]", text)
    value = mode.group(1) if mode else text.strip()
    if value == "confidentiality":
        return _Finding("degraded", value, "boot without lockdown=confidentiality")
    return _ok(value)


def _unprivileged_bpf() -> _Finding:
    try:
        value = Path("/proc/sys/kernel/unprivileged_bpf_disabled").read_text().strip()
    except OSError:
        return _ok("not shown")
    return _ok({"0": "allowed", "1": "off for good", "2": "off"}.get(value, value))


# --- the machine ------------------------------------------------------------------------------------------


def _ram() -> _Finding:
    info = memory.meminfo()
    available = info["MemAvailable"]
    value = f"{available / memory.GIB:.1f} GiB available of {info['MemTotal'] / memory.GIB:.1f} GiB"
    if available < memory.GIB // 4:
        return _Finding("missing", value, "free some memory: the table takes an eighth of what is free")
    if available < 2 * memory.GIB:
        return _Finding("degraded", value, "small table: 2 GiB or more are better")
    return _ok(value)


def _cpus() -> _Finding:
    count = len(os.sched_getaffinity(0))
    if count < 2:
        return _Finding("degraded", "1", "client and server share one CPU: the benchmark says little")
    return _ok(str(count))


def _limits() -> _Finding:
    def text(value: int) -> str:
        return "unlimited" if value == resource.RLIM_INFINITY else str(value)

    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    memory = resource.getrlimit(resource.RLIMIT_AS)[0]
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    value = f"NOFILE {text(files)}, AS {text(memory)}, MEMLOCK {text(locked)}"
    if 0 <= files < 1024:
        return _Finding("degraded", value, "ulimit -Hn 4096 (200 clients need more files)")
    if memory != resource.RLIM_INFINITY:
        return _Finding("degraded", value, "ulimit -v unlimited (the table is mapped)")
    return _ok(value)


def _capabilities() -> _Finding:
    effective = capabilities.effective()
    lacking = [name for name, bit in _CAPABILITIES.items() if not effective >> bit & 1]
    if lacking:
        return _Finding("missing", f"without {', '.join(lacking)}", "run as root (sudo)")
    return _ok(", ".join(_CAPABILITIES))


def _cache_space() -> _Finding:
    try:
        path = cache.root()
        free = shutil.disk_usage(path).free
        writable = os.access(path, os.W_OK)
    except (KflexError, OSError) as error:
        return _Finding("missing", str(error), "set KFLEX_CACHE to another place")
    value = f"{path}, {free / memory.GIB:.1f} GiB free"
    if not writable or free < 50 << 20:
        return _Finding("missing", value, "free some space, or set KFLEX_CACHE to another place")
    return _ok(value)


# --- tools ------------------------------------------------------------------------------------------------


def _tool(
    look: Callable[[], toolchain.Tool | None], demand: Callable[[], toolchain.Tool]
) -> Callable[[], _Finding]:
    def find() -> _Finding:
        try:
            tool = demand()
        except KflexError as error:
            old = look()
            return _Finding("missing", f"{old.text} ({old.path})" if old else "not found", error.fix)
        return _ok(f"{tool.text} ({tool.path})")

    return find


def _libbpf() -> _Finding:
    try:
        major, minor = libbpf.version()
    except KflexError as error:
        return _Finding(
            "missing", error.what, "apt install libbpf1 libbpf-dev, or kflex-repro build --libbpf-from-source"
        )
    headers = Path("/usr/include/bpf/bpf_helpers.h").exists()
    if not headers:
        return _Finding("missing", f"{major}.{minor}, without headers", "apt install libbpf-dev")
    return _ok(f"{major}.{minor}, with headers")


def _redis() -> _Finding:
    try:
        version = server.redis_version()
    except KflexError as error:
        return _Finding("missing", error.what, "apt install redis-server")
    value = f"{'.'.join(map(str, version))} ({server.redis_binary()})"
    if not server.known_good(version):
        good = ", ".join(f"{major}.{minor}" for major, minor in sorted(server.KNOWN_GOOD))
        return _Finding(
            "missing",
            f"{value}: its event loop was not checked",
            f"use Redis {good} (KFLEX_REDIS_SERVER=PATH)",
        )
    return _ok(value)


def _program(name: str, package: str, optional: bool = False) -> Callable[[], _Finding]:
    def find() -> _Finding:
        found = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
        if found is None:
            return _Finding("degraded" if optional else "missing", "not found", f"apt install {package}")
        return _ok(found)

    return find


def _python() -> _Finding:
    value = platform.python_version()
    lacking = [
        name
        for name in ("click", "rich", "redis", "resp_benchmark", "matplotlib", "hdrh", "elftools")
        if importlib.util.find_spec(name) is None
    ]
    if lacking:
        return _Finding(
            "missing", f"{value}, without {', '.join(lacking)}", "make setup, or pip install -e ."
        )
    return _ok(f"{value} ({sys.prefix})")


def _kvm() -> _Finding:
    """Whether guests then run is only known by trying: nested virtualisation may be incomplete."""
    from kflex_repro.vm import qemu

    fix = "VMs are emulated without it, and slow"
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except PermissionError as error:
        return _Finding("degraded", error.strerror or "", f"be in its group (usermod -aG kvm USER): {fix}")
    except OSError as error:
        return _Finding("degraded", error.strerror or "", fix)
    # A guest tried it, since this host was booted.
    if qemu.kvm_has_failed():
        return _Finding("degraded", "/dev/kvm can be opened, but runs no guest", fix)
    return _ok("/dev/kvm can be opened")


def _rows() -> tuple[_Row, ...]:
    def bpf(key: str, title: str, purpose: str, run: Callable[[], str], required: bool = False) -> _Row:
        return _Row(
            key, title, purpose, _from_probe(run, not required), required, needs_root=True, of_kernel=True
        )

    later = "the artifact path and later tools"
    return (
        _Row("kernel", "kernel", "BPF features of 6.1", _kernel, required=True, of_kernel=True),
        _Row("arch", "architecture", "the gate's view of system calls", _arch, required=True),
        _Row("btf", "kernel BTF", "vmlinux.h, CO-RE, tp_btf", _btf, required=True, of_kernel=True),
        _Row("jit", "BPF JIT", "speed of the programs", _jit),
        bpf("mmapable", "BPF mmapable array", "the table shared with user space", probe.mmapable, True),
        bpf("sockops", "BPF sockops", "enrols connections", probe.sockops, True),
        bpf("sk_msg", "BPF sk_msg", "answers GET and SET", probe.sk_msg, True),
        bpf("tp_btf", "BPF tp_btf sched_switch", "sees Redis fall asleep", probe.tp_btf, True),
        bpf("iter_tcp", "BPF iter/tcp", "finds connections that are there already", probe.iter_tcp, True),
        bpf("sk_skb", "BPF sk_skb", "KFlex's own hook, for comparison", probe.sk_skb),
        bpf("tcx", "BPF tcx", "serving remote clients (later)", probe.tcx),
        bpf("fentry", "BPF fentry", "probes at functions (later)", probe.fentry),
        bpf("kprobe", "kprobes", "probes at functions (later)", probe.kprobe),
        bpf(
            "uprobe_multi", "uprobe_multi", "probes at all functions of a server at once", probe.uprobe_multi
        ),
        bpf("arena", "BPF arena", later, probe.arena),
        _Row("cgroup2", "cgroup v2", "where sockops attaches", _cgroup2, required=True, of_kernel=True),
        _Row(
            "bpffs",
            "bpffs",
            "pins that outlive us",
            _file_system("bpf", "/sys/fs/bpf", True),
            required=True,
            of_kernel=True,
        ),
        _Row("tracefs", "tracefs", later, _file_system("tracefs", "/sys/kernel/tracing", False)),
        _Row(
            "capabilities",
            "capabilities",
            "loading and attaching",
            _capabilities,
            required=True,
            needs_root=True,
            of_kernel=True,
        ),
        _Row("lockdown", "kernel lockdown", "reading kernel memory in BPF", _lockdown),
        _Row("unprivileged_bpf", "unprivileged BPF", "nothing: we run as root", _unprivileged_bpf),
        _Row("va_bits", "address space", "where KFlex looks for its heap", _va_bits),
        _Row("ram", "memory", "the table (allocated at once)", _ram, required=True),
        _Row("cpus", "CPUs", "client and server side by side", _cpus),
        _Row("limits", "resource limits", "many clients, mapped tables", _limits),
        _Row("cache", "build cache", "objects, module, logs", _cache_space, required=True),
        _Row(
            "clang",
            "clang",
            "compiles the BPF programs",
            _tool(toolchain.find_clang, toolchain.clang),
            required=True,
        ),
        _Row("cc", "C compiler", "compiles kflex.so", _tool(toolchain.find_cc, toolchain.cc), required=True),
        _Row(
            "bpftool",
            "bpftool",
            "writes vmlinux.h",
            _tool(toolchain.find_bpftool, toolchain.bpftool),
            required=True,
        ),
        _Row("libbpf", "libbpf", "loads the programs", _libbpf, required=True),
        _Row("redis", "redis-server", "the server to offload", _redis, required=True),
        _Row(
            "redis_benchmark",
            "redis-benchmark",
            "the benchmark's load",
            _program("redis-benchmark", "redis-tools"),
            True,
        ),
        _Row("ip", "ip (iproute2)", "clients over veth (--netns)", _program("ip", "iproute2", True)),
        _Row("perf", "perf", "kflex-repro profile", _tool(toolchain.find_perf, toolchain.perf)),
        _Row("python", "Python", "this toolkit", _python, required=True),
        _Row(
            "qemu",
            "QEMU",
            "VMs: where this kernel refuses BPF",
            _program("qemu-system-x86_64", "qemu-system-x86", True),
        ),
        _Row("kvm", "KVM", "fast VMs", _kvm),
    )


# --- what callers ask -------------------------------------------------------------------------------------


@functools.cache
def fact(key: str) -> Fact:
    """One fact by its key; KeyError for an unknown one."""
    row = next((row for row in _rows() if row.key == key), None)
    if row is None:
        raise KeyError(key)
    try:
        found = row.find()
    except OSError as error:
        found = _Finding("missing", str(error), "run as root, with /proc and /sys mounted")
    # What the default job does without cannot be missing, only weaken something else.
    state: State = "degraded" if found.state == "missing" and not row.required else found.state
    return Fact(
        key=row.key,
        title=row.title,
        state=state,
        value=found.value,
        purpose=row.purpose,
        fix=found.fix,
        required=row.required,
        needs_root=row.needs_root,
        of_kernel=row.of_kernel,
    )


def facts() -> tuple[Fact, ...]:
    """All facts, in the order of the report."""
    return tuple(fact(row.key) for row in _rows())


def missing() -> tuple[Fact, ...]:
    """The facts that keep the default job from running; empty when it can run."""
    return tuple(found for found in facts() if found.required and found.state == "missing")


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "unknown")
    except OSError:
        return "unknown"


def machine() -> dict[str, object]:
    """What this machine is, JSON-ready; nothing that names it."""
    hypervisor = bool(re.search(r"^flags\s*:.*\bhypervisor\b", Path("/proc/cpuinfo").read_text(), re.M))
    return {
        "kernel": platform.release(),
        "distribution": _distribution(),
        "arch": platform.machine(),
        "cpu": cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "ram_bytes": memory.meminfo()["MemTotal"],
        "virtual": hypervisor,
        "emulated": emulated(),
    }


def summary() -> dict[str, object]:
    """What a result records about the machine, JSON-ready: machine() and what doctor finds."""
    found = {one.key: {"state": one.state, "value": one.value} for one in facts()}
    return {**machine(), "facts": found}


def refused() -> tuple[Fact, ...]:
    """Those of missing() that a VM has of its own: with nothing else missing, the default job runs in one."""
    return tuple(found for found in missing() if found.of_kernel)


def refusal() -> str:
    """One line: what refused() says, and why; "" where nothing is refused."""
    lacking = refused()
    if not lacking:
        return ""
    # Without the rights, every probe of BPF fails for that reason.
    words = [one.value for one in lacking if one.key == "capabilities"]
    if others := [one.title for one in lacking if one.key != "capabilities"]:
        words.append(f"missing: {', '.join(others)}")
    who = "this host refuses BPF" if is_root() else "this user may not use BPF"
    return f"{who} ({'; '.join(words)})"


def as_json() -> dict[str, object]:
    """The whole report, JSON-ready."""
    lacking = missing()
    return {
        "ok": not lacking,
        "missing": [found.key for found in lacking],
        "facts": [asdict(found) for found in facts()],
    }
