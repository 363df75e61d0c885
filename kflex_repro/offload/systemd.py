"""What a systemd service forbids its redis-server, read from its unit files: systemd need not run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kflex_repro.errors import KflexError

# systemd.unit(5), in order of precedence.
_DIRECTORIES = (
    "etc/systemd/system",
    "run/systemd/system",
    "usr/local/lib/systemd/system",
    "usr/lib/systemd/system",
    "lib/systemd/system",
)
DROP_IN = "kflex.conf"
# Where the service sees our pins (module/recover.c looks there): bpffs is root's alone on systemd hosts.
PINS = "/run/kflex"
# `systemd-analyze syscall-filter`: sets that hold bpf().
_BPF_SETS = frozenset({"bpf", "@privileged", "@known"})


@dataclass(frozen=True)
class Need:
    """A setting that a drop-in must add, and what for."""

    setting: str
    why: str


@dataclass(frozen=True)
class Unit:
    """A service: the (key, value) pairs of its [Service] section, drop-ins included, ours left out."""

    name: str
    settings: tuple[tuple[str, str], ...]
    root: Path = Path("/")

    @property
    def drop_in(self) -> Path:
        """Our drop-in's place."""
        return self.root / _DIRECTORIES[0] / f"{self.name}.d" / DROP_IN

    def values(self, key: str) -> list[str]:
        """All words of a list setting; an empty assignment starts anew."""
        found: list[str] = []
        for name, value in self.settings:
            if name == key:
                found = [*found, *value.split()] if value else []
        return found

    def last(self, key: str) -> str:
        """The value of a setting that has only one, "" if it is not set."""
        found = [value for name, value in self.settings if name == key]
        return found[-1] if found else ""

    def is_on(self, key: str) -> bool:
        """A boolean setting (or a mode other than no)."""
        return self.last(key).lower() not in ("", "no", "false", "0", "off")

    def needs(self, module_dir: Path) -> list[Need]:
        """What to add so that kflex.so can be loaded from ``module_dir`` and do its work; KflexError if it
        cannot."""
        self._must_see(module_dir)
        found = []
        if not self._may_execute(module_dir):
            found.append(Need(f"ExecPaths={module_dir}", "the service may execute the module"))
        if not self._permits("RestrictAddressFamilies", frozenset({"AF_UNIX"})):
            found.append(
                Need("RestrictAddressFamilies=AF_UNIX", "the toolkit talks to the module over AF_UNIX")
            )
        if not self._permits("SystemCallFilter", _BPF_SETS):
            found.append(
                Need("SystemCallFilter=bpf", "after a crash the module opens the table that the kernel kept")
            )
        if self.last("User") not in ("", "root", "0"):
            found.append(
                Need(f"BindPaths=-/sys/fs/bpf/kflex:{PINS}", "the service's user can reach that table")
            )
        return found

    def notes(self) -> list[str]:
        """What the administrator should know, besides."""
        found = []
        if self.is_on("PrivateNetwork"):
            found.append("the service has a network of its own: give `offload start` --pid")
        if self.last("Type") == "forking":
            found.append(
                "the service forks: after a restart its pid file must be right for systemd to see it"
            )
        return found

    def _must_see(self, place: Path) -> None:
        for key in ("RootDirectory", "RootImage"):
            if self.last(key):
                raise KflexError(
                    f"the service has a root of its own ({key}={self.last(key)})",
                    self.name,
                    "install the module in there by hand, and load it in its redis.conf",
                )
        hidden = [path.lstrip("-+") for path in self.values("InaccessiblePaths")]
        if self.is_on("ProtectHome"):
            hidden += ["/home", "/root", "/run/user"]
        if self.is_on("PrivateTmp"):
            hidden += ["/tmp", "/var/tmp"]
        for path in hidden:
            if place.is_relative_to(path):
                raise KflexError(f"the service cannot see {path}", str(place), "choose another --prefix")

    def _may_execute(self, place: Path) -> bool:
        """The longest path that holds the directory decides."""
        best, allowed = -1, True
        for key, verdict in (("NoExecPaths", False), ("ExecPaths", True)):
            for path in self.values(key):
                clean = Path(path.lstrip("-+"))
                if place.is_relative_to(clean) and len(clean.parts) > best:
                    best, allowed = len(clean.parts), verdict
        return allowed

    def _permits(self, key: str, words: frozenset[str]) -> bool:
        """systemd.exec(5): the first assignment says whether the list allows or denies, the rest edit it."""
        allows: bool | None = None
        listed = False
        for name, value in self.settings:
            if name != key:
                continue
            if not value:
                allows, listed = None, False
                continue
            inverted = value.startswith("~")
            if allows is None:
                allows = not inverted
            if words & {word.partition(":")[0] for word in value.lstrip("~").split()}:
                listed = inverted != allows
        return True if allows is None else listed == allows


def parse(text: str) -> list[tuple[str, str]]:
    """The [Service] section's assignments; a line that ends with a backslash goes on."""
    found = []
    section = ""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        line = line.strip()
        if not line or line[0] in "#;":
            continue
        if line.startswith("["):
            section = line.strip("[]")
        elif section == "Service" and "=" in line:
            key, _, value = line.partition("=")
            found.append((key.strip(), value.strip()))
    return found


def read(name: str, root: Path = Path("/")) -> Unit:
    """The service ``name`` (an instance of a template too); KflexError if there is none."""
    full = name if name.endswith(".service") else f"{name}.service"
    template = re.sub(r"@[^.]+\.", "@.", full)
    names = [full] if template == full else [full, template]
    file = next((p for n in names for p in _candidates(root, n) if p.is_file()), None)
    if file is None:
        raise KflexError("no such service", full, "see `systemctl list-units 'redis*'`")
    # An alias (redis.service) is a symlink: the drop-ins are those of the real name.
    real = file.resolve().name
    if template == full and real != full and real.endswith(".service"):
        full, names = real, [real]
    parts = {
        part.name: part
        for each in reversed(names)
        for directory in reversed(_DIRECTORIES)
        for part in sorted((root / directory / f"{each}.d").glob("*.conf"))
    }
    settings = parse(file.read_text(errors="replace"))
    for part_name in sorted(parts):
        if part_name != DROP_IN:
            settings += parse(parts[part_name].read_text(errors="replace"))
    return Unit(full, tuple(settings), root)


def _candidates(root: Path, name: str) -> Iterable[Path]:
    return (root / directory / name for directory in _DIRECTORIES)


def of_pid(pid: int, root: Path = Path("/")) -> Unit | None:
    """The service that a process belongs to, by its control group; None if it is no service."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        last = Path(line.rpartition(":")[2]).name
        if last.endswith(".service") and not last.startswith("user@"):
            return read(last, root)
    return None


def of_config(config: Path, root: Path = Path("/")) -> Unit | None:
    """The one service whose ExecStart names this configuration file; None if there is none, or more."""
    found = {}
    for directory in _DIRECTORIES:
        for file in sorted((root / directory).glob("*.service")):
            for key, value in parse(file.read_text(errors="replace")) if file.is_file() else ():
                if key == "ExecStart" and str(config) in value.split() and "@." not in file.name:
                    unit = read(file.name, root)
                    found[unit.name] = unit
    return next(iter(found.values())) if len(found) == 1 else None
