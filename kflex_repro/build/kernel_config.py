"""A kernel's configuration: fragments on top of tinyconfig or the host's, merged by the kernel's own Kconfig.

And then checked: an option that was asked for and is not there is the one that is missed weeks later.
"""

from __future__ import annotations

import gzip
import platform
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kflex_repro.build import cache, objects, toolchain
from kflex_repro.build.kernel_source import Arch, Tree
from kflex_repro.errors import KflexError

DEFAULT = ("base", "bpf", "net", "trace", "vm")
# The architecture's own is always taken; what the host's configuration needs, with that alone.
_OF_ARCH = ("x86", "riscv")
_OF_HOST = "host"
_KIND = "kernel-config"
_SET = re.compile(r"CONFIG_(\w+)=(.+)")
_UNSET = re.compile(r"# CONFIG_(\w+) is not set")


@dataclass(frozen=True)
class Asked:
    """An option as a fragment wants it: ``value`` is y, m, n, a number or a quoted string."""

    name: str
    value: str
    where: str

    @property
    def line(self) -> str:
        """As it stands in a configuration."""
        if self.value == "n":
            return f"# CONFIG_{self.name} is not set"
        return f"CONFIG_{self.name}={self.value}"


@dataclass(frozen=True)
class Dropped:
    """An option that did not stick: what it is instead, and why."""

    asked: Asked
    value: str
    why: str = ""

    def __str__(self) -> str:
        text = f"CONFIG_{self.asked.name}={self.asked.value} ({self.asked.where}) is {self.value}"
        return f"{text}: {self.why}" if self.why else text


@dataclass(frozen=True)
class Config:
    """A complete configuration, and what of the fragments is not in it."""

    text: str
    base: str
    fragments: tuple[str, ...]
    asked: tuple[Asked, ...]
    dropped: tuple[Dropped, ...]

    @property
    def values(self) -> dict[str, str]:
        """Each option that is on, or has a value."""
        return parse(self.text)

    @property
    def options(self) -> int:
        """How many options are on."""
        return sum(value in ("y", "m") for value in self.values.values())


def directory() -> Path:
    """Where the fragments are."""
    return objects.source_root() / "kernel"


def names() -> tuple[str, ...]:
    """The fragments that can be asked for by name."""
    found = sorted(path.stem for path in directory().glob("*.config"))
    return tuple(name for name in found if name != _OF_HOST)


def select(arch: Arch, wanted: Sequence[str], of_host: bool) -> tuple[Path, ...]:
    """The fragments' files, in the order in which they are merged: what comes later wins.

    ``wanted`` are names or paths; nothing is the default set, or, on the host's configuration, none.
    """
    chosen = list(dict.fromkeys(wanted)) or ([] if of_host else list(DEFAULT))
    own = [_OF_HOST] if of_host else [arch.source]
    files = [*(name for name in own if name not in chosen), *chosen]
    return tuple(_file(name, arch) for name in files)


def _file(name: str, arch: Arch) -> Path:
    if "/" in name or name.endswith(".config"):
        path = Path(name)
        if not path.is_file():
            raise KflexError("no such fragment", name, "--fragment wants a name or the path of a file")
        return path
    path = directory() / f"{name}.config"
    if not path.is_file():
        fix = f"there are {', '.join(names())}; or the path of a file"
        raise KflexError(f"no fragment {name}", str(directory()), fix)
    if name in _OF_ARCH and name != arch.source:
        raise KflexError(
            f"fragment {name} is not for {arch.name}", "", "leave it out, or choose another --arch"
        )
    return path


def read(path: Path) -> list[Asked]:
    """What a fragment asks for; KflexError names the line that is none."""
    found = []
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KflexError(f"cannot read the fragment: {error}", str(path)) from None
    for number, line in enumerate(map(str.strip, lines), 1):
        where = f"{path.name}:{number}"
        if match := _SET.fullmatch(line):
            found.append(Asked(match.group(1), match.group(2), where))
        elif match := _UNSET.fullmatch(line):
            found.append(Asked(match.group(1), "n", where))
        elif line and not line.startswith("#"):
            fix = "CONFIG_NAME=value, or # CONFIG_NAME is not set"
            raise KflexError(f"not an option: {line}", f"{path}:{number}", fix)
    return found


def parse(text: str) -> dict[str, str]:
    """The options of a configuration that are on or have a value."""
    return {match.group(1): match.group(2) for match in map(_SET.fullmatch, text.splitlines()) if match}


def of_host() -> tuple[str, str]:
    """(the running kernel's configuration, where it was found); KflexError where it is not to be had."""
    release = platform.release()
    for path in (Path("/proc/config.gz"), Path(f"/boot/config-{release}")):
        try:
            data = path.read_bytes()
            return (gzip.decompress(data) if path.suffix == ".gz" else data).decode(), str(path)
        except (OSError, EOFError, UnicodeDecodeError):
            continue
    fix = "without --host-config: tinyconfig and the fragments"
    raise KflexError("the host's configuration is not there", f"/proc/config.gz, /boot/config-{release}", fix)


def make(
    tree: Tree,
    arch: Arch,
    fragments: Sequence[Path],
    base: tuple[str, str] | None,
    banners: Iterable[str],
    runner: toolchain.Runner,
) -> Config:
    """Merge the fragments on ``base`` (a configuration and its name; tinyconfig if None), and check them.

    ``banners`` identify the tools: what Kconfig finds out about them is in its result.
    """
    # The later one wins, as in the kernel's own merge_config.sh.
    asked = tuple({one.name: one for path in fragments for one in read(path)}.values())
    merged = "".join(f"{one.line}\n" for one in asked)
    key = cache.digest([tree.key, arch.name, base[0] if base else "tinyconfig", merged, *banners])
    log = cache.root() / "logs" / f"kernel-config-{key[:12]}.log"

    def configure(out: Path) -> None:
        log.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(prefix=".kconfig-", dir=cache.root()) as work:
            place = Path(work)
            command: list[str | Path] = ["make", "-C", tree.root, f"O={place}", *arch.variables]
            if base:
                (place / ".config").write_text(f"{base[0]}\n")
            else:
                runner.run("tinyconfig", [*command, "tinyconfig"], log)
            with (place / ".config").open("a") as stream:
                stream.write(merged)
            runner.run("the kernel's configuration", [*command, "olddefconfig"], log)
            (out / "config").write_bytes((place / ".config").read_bytes())

    place, _ = cache.obtain(_KIND, key, configure)
    text = (place / "config").read_text()
    dropped = check(asked, text)
    if dropped:
        reasons = explain(tree, arch, text, dropped)
        dropped = tuple(Dropped(one.asked, one.value, reasons.get(one.asked.name, "")) for one in dropped)
    name = base[1] if base else "tinyconfig"
    return Config(text, name, tuple(path.stem for path in fragments), asked, dropped)


def check(asked: Iterable[Asked], text: str) -> tuple[Dropped, ...]:
    """What was asked for, and is otherwise in the configuration."""
    values = parse(text)
    # An empty text is as good as none.
    found = ((one, values.get(one.name, '""' if one.value == '""' else "n")) for one in asked)
    return tuple(Dropped(one, value) for one, value in found if value != one.value)


def explain(tree: Tree, arch: Arch, text: str, dropped: Iterable[Dropped]) -> Mapping[str, str]:
    """Why each option did not stick, by name, as the tree's Kconfig files and the configuration say."""
    # Slow to import and to read the tree (3 s): only where something is to be explained.
    from kflex_repro.build import kernel_kconfig

    return kernel_kconfig.explain(tree.root, tree.version, arch, parse(text), tuple(dropped))


def demand(config: Config) -> None:
    """KflexError, naming what did not stick, if anything did not."""
    if config.dropped:
        shown = "; ".join(map(str, config.dropped[:3]))
        more = f"; and {len(config.dropped) - 3} more" if len(config.dropped) > 3 else ""
        count = f"{len(config.dropped)} option{'s' if len(config.dropped) > 1 else ''} did not stick"
        fix = "ask for what is needed, too, or leave it out; --allow-dropped builds without"
        raise KflexError(f"{count}: {shown}{more}", "", fix)
