"""What a mode of the artifact needs of this machine, each looked at; nothing is attached or stays bound."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kflex_repro import host
from kflex_repro.bpf import fs, kernel
from kflex_repro.errors import KflexError
from kflex_repro.heap import model, verify
from kflex_repro.run.modes import PORT, Mode

State = Literal["ok", "missing", "warning"]

# What Main.cpp opens, unless the recipe or somebody by hand changed it.
_CGROUP = Path("/sys/fs/cgroup")
_RECIPE = "cgroup2-path"
KERNEL_FIX = (
    "boot a kernel built from KFlex's own tree (its submodule linux, github.com/rs3lab/KFlex-linux); "
    "no distribution's kernel has it"
)


@dataclass(frozen=True)
class Check:
    """One need: what was found, and how to get what is missing ("" when ok)."""

    name: str
    state: State
    value: str
    fix: str = ""


@dataclass(frozen=True)
class Interface:
    """A network interface: its index, its name, and the id of the XDP program on it (0: none)."""

    index: int
    name: str
    xdp: int


def heap_type() -> Check:
    """Whether the running kernel knows KFlex's heap, by name."""
    number = kernel.map_type(kernel.HEAP_TYPE)
    if number is None:
        value = f"kernel {os.uname().release} has no {kernel.HEAP_TYPE} in its BTF"
        return Check("heap map type", "missing", value, KERNEL_FIX)
    return Check("heap map type", "ok", f"{kernel.HEAP_TYPE} = {number}")


def functions(objects: Iterable[Path]) -> Check:
    """Whether the running kernel has every function that the objects call."""
    objects = list(objects)
    lacking = kernel.lacking(objects)
    if lacking:
        names = ", ".join(one.name for one in lacking)
        value = f"{len(lacking)} of those the objects call are not there: {names}"
        return Check("kernel functions", "missing", value, KERNEL_FIX)
    called = len({name for path in objects for name in kernel.externs(path)})
    return Check(
        "kernel functions", "ok", f"all {called} that the objects call" if called else "none is called"
    )


def of_kernel(objects: Iterable[Path]) -> tuple[Check, ...]:
    """What the running kernel must have for these objects."""
    try:
        objects = tuple(objects)
        return (heap_type(), functions(objects)) if objects else (heap_type(),)
    except KflexError as error:
        return (Check("kernel BTF", "missing", error.what, error.fix),)


def _root() -> Check:
    if host.is_root():
        return Check("root", "ok", "yes")
    return Check("root", "missing", "no", "run it with sudo")


def cgroup(program: Path | None, recipes: Iterable[str] = ()) -> Check:
    """Whether the program will find the cgroup v2 root: by its recipes, else by the path written in it."""
    root = fs.cgroup2_root()
    if root is None:
        return Check("cgroup v2", "missing", "not mounted", "mount -t cgroup2 none /sys/fs/cgroup/unified")
    asks = _RECIPE in recipes
    if root != _CGROUP and not asks and (program is None or _says(program, f"{_CGROUP}\0".encode())):
        fix = f"kflex-repro build --artifact --source DIR --recipe {_RECIPE}"
        return Check("cgroup v2", "missing", f"at {root}; the program opens {_CGROUP}", fix)
    return Check("cgroup v2", "ok", str(root))


def _says(program: Path, text: bytes) -> bool:
    try:
        return text in program.read_bytes()
    except OSError:
        return True


def port() -> Check:
    """Whether the port, fixed in the program, is free."""
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        # The artifact's own sockets of a moment ago may still be closing.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", PORT))
        except OSError as error:
            fix = f"end what listens there: ss -ltnp sport = :{PORT}"
            return Check("port", "missing", f"{PORT}: {error.strerror}", fix)
    return Check("port", "ok", f"{PORT} is free")


def interface(index: int | None, name: str | None) -> Interface:
    """The interface a user means. KflexError if there is none, or if both are given and differ."""
    if index is None and name is None:
        raise KflexError("no interface was chosen", "", f"--interface NAME, one of: {', '.join(_names())}")
    try:
        found = socket.if_indextoname(index) if index is not None else str(name)
        number = socket.if_nametoindex(found)
    except (OSError, OverflowError):
        what = f"no network interface {index if index is not None else name}"
        raise KflexError(what, "", f"--interface NAME, one of: {', '.join(_names())}") from None
    if name is not None and name != found:
        raise KflexError(f"--ifindex {index} is {found}, --interface says {name}", "", "give one of them")
    return Interface(number, found, xdp(found))


def _names() -> list[str]:
    return [f"{name} ({index})" for index, name in socket.if_nameindex()]


def xdp(name: str) -> int:
    """The id of the XDP program on an interface, 0 if there is none."""
    try:
        done = subprocess.run(
            ["ip", "-j", "link", "show", "dev", name], check=False, capture_output=True, text=True, timeout=20
        )
        link = json.loads(done.stdout or "[]")[0]
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return 0
    program = link.get("xdp", {})
    programs = [program.get("prog", {}), *(one.get("prog", {}) for one in program.get("attached", []))]
    return next((int(one["id"]) for one in programs if one.get("id")), 0)


def _xdp_free(on: Interface) -> Check:
    if on.xdp:
        fix = f"the artifact would replace it; take it off first: ip link set dev {on.name} xdp off"
        return Check("interface", "missing", f"{on.name} has an XDP program already (id {on.xdp})", fix)
    return Check("interface", "ok", f"{on.name}, index {on.index}")


def heaps(objects: Iterable[Path]) -> list[Check]:
    """Whether this machine can hold each object's heaps: those of one object exist together."""
    return [check for path in objects for check in _heaps_of(path)]


def _heaps_of(path: Path) -> Iterator[Check]:
    try:
        compiled = verify.inspect(path)
    except KflexError as error:
        yield Check("heap", "missing", f"{path.name}: {error.what}", error.fix)
        return
    on = model.machine()
    wrong = [heap.complaint for heap in compiled if heap.complaint]
    if not wrong:
        known = [model.Heap(heap.name, heap.pages // model.PAGES_PER_GB, path.name) for heap in compiled]
        wrong = [problem.what for problem in model.check(known, on, {})]
    sizes = ", ".join(f"{heap.name} {heap.gb:g} GB" for heap in compiled)
    if wrong:
        fix = "kflex-repro build --artifact --source DIR --heap-gb auto (or fit-heap, to change the tree)"
        yield Check("heap", "missing", f"{path.name}: {'; '.join(wrong)}", fix)
        return
    yield Check("heap", "ok", f"{path.name}: {sizes}, {on.ram_available / model.GIB:.1f} GB are available")


def of_mode(
    mode: Mode,
    objects: Iterable[Path],
    program: Path | None,
    recipes: Iterable[str],
    on: Interface | None,
) -> tuple[Check, ...]:
    """Everything a mode needs, in the order in which the program would trip over it."""
    objects = tuple(objects)
    found = [_root(), *of_kernel(objects), *heaps(objects), cgroup(program, recipes), port()]
    if mode.interface and on is not None:
        found.append(_xdp_free(on))
    return tuple(found)
