"""Redis's own test suite from the distribution's source package of the installed redis-server.

The package is fetched with apt-get and a deb-src list of our own: the system's sources and lists stay as
they are.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from kflex_repro.build import cache, toolchain
from kflex_repro.errors import KflexError, Unavailable

_KIND = "redis-suite"
# What runtest reads: the rest of the source is not needed and not kept.
_PARTS = ("tests", "utils", "runtest", "redis.conf", "sentinel.conf")
_KEYRING = "/usr/share/keyrings/{}-archive-keyring.gpg"


@functools.cache
def installed_version() -> tuple[str, str]:
    """(source package, its version) of the installed redis-server; Unavailable where it is no package."""
    fields = "-f=${source:Package} ${source:Version}"
    words = toolchain.output(["dpkg-query", "-W", fields, "redis-server"]).split()
    if len(words) != 2:
        raise Unavailable("redis-server is not installed as a package", "", "apt install redis-server")
    return words[0], words[1]


def deb_src_lines(policy: str) -> list[str]:
    """The deb-src lines of all archives that `apt-cache policy redis-server` names.

    >>> deb_src_lines("     500 http://deb.debian.org/debian bookworm/main amd64 Packages")
    ['http://deb.debian.org/debian bookworm main']
    """
    found = re.findall(r"^\s+-?\d+ (\S+://\S+) (\S+)/(\S+) \S+ Packages$", policy, re.M)
    return [f"{uri} {suite} {component}" for uri, suite, component in dict.fromkeys(found)]


def choose(installed: str, offered: list[str]) -> str:
    """The offered version for the installed one: the same, else the newest of the same upstream version.

    An archive keeps only its newest: the tests of a security update later are still those of this Redis.
    """
    if installed in offered:
        return installed
    upstream = installed.rpartition("-")[0]
    same = [version for version in offered if version.rpartition("-")[0] == upstream]
    if not same:
        raise Unavailable(
            f"no archive has the source of redis {installed} (only {', '.join(offered) or 'nothing'})",
            "apt-get source",
            "apt-get update && apt-get install redis-server",
        )
    newest = same[0]
    for version in same[1:]:
        if not subprocess.run(["dpkg", "--compare-versions", version, "gt", newest], check=False).returncode:
            newest = version
    return newest


def _apt(work: Path) -> dict[str, str]:
    """The environment of an apt that has its own sources, lists and cache under ``work``."""
    lines = deb_src_lines(toolchain.output(["apt-cache", "policy", "redis-server"]))
    if not lines:
        raise Unavailable("apt knows no archive of redis-server", "", "run apt-get update first")
    keyrings = [path for name in ("debian", "ubuntu") if (path := Path(_KEYRING.format(name))).exists()]
    signed = f"[signed-by={','.join(map(str, keyrings))}] " if keyrings else ""
    for name in ("lists/partial", "cache/archives/partial", "sources.list.d"):
        (work / name).mkdir(parents=True)
    (work / "sources.list").write_text("".join(f"deb-src {signed}{line}\n" for line in lines))
    (work / "apt.conf").write_text(
        f'Dir::Etc::SourceList "{work}/sources.list";\n'
        f'Dir::Etc::SourceParts "{work}/sources.list.d";\n'
        f'Dir::State::Lists "{work}/lists";\n'
        f'Dir::Cache "{work}/cache";\n'
        # The user _apt cannot write into our directory.
        'APT::Sandbox::User "root";\n'
    )
    return {"APT_CONFIG": str(work / "apt.conf")}


def _fetch(out: Path, name: str, version: str) -> None:
    runner, log = toolchain.Runner(), toolchain.log_path(_KIND, cache.digest([name, version]))
    with tempfile.TemporaryDirectory(prefix="kflex-apt-") as directory:
        work = Path(directory)
        env = _apt(work)
        command = ["env", *(f"{key}={value}" for key, value in env.items())]
        runner.run("the list of source packages", [*command, "apt-get", "update"], log)
        offered = re.findall(r"^Version: (\S+)$", toolchain.output(["apt-cache", "showsrc", name], env), re.M)
        chosen = choose(version, offered)
        # apt checks signatures and hashes, dpkg-source applies the distribution's patches.
        runner.run(
            "the download of Redis's source",
            [*command, "apt-get", "source", f"{name}={chosen}"],
            log,
            cwd=work,
        )
        trees = [path.parent for path in work.glob("*/runtest")]
        if len(trees) != 1:
            raise toolchain.BuildError("the source of Redis", "apt-get source left no runtest", log)
        for part in _PARTS:
            source = trees[0] / part
            if source.is_dir():
                shutil.copytree(source, out / part, symlinks=True)
            elif source.exists():
                shutil.copy2(source, out / part)
        (out / "version").write_text(f"{name} {chosen}\n")


def ensure() -> Path:
    """The tests of the installed redis-server: a directory with runtest and tests/, in the cache.

    Fetched once for each version (3 MB), and again if a file of it is not what it was.
    """
    name, version = installed_version()
    for program, package in (("apt-get", "apt"), ("dpkg-source", "dpkg-dev"), ("patch", "patch")):
        if shutil.which(program) is None:
            raise Unavailable(f"{program} is not installed", "", f"apt install {package}")
    place, _ = cache.obtain(_KIND, cache.digest([name, version]), lambda out: _fetch(out, name, version))
    return place


def tree(place: Path, binaries: Path) -> Path:
    """A working copy of the suite at ``place``, with the programs of ``binaries`` where it looks for them."""
    shutil.copytree(ensure(), place, symlinks=True)
    (place / "src").mkdir()
    names = ("server", "cli", "benchmark", "check-aof", "check-rdb", "sentinel")
    for name in names:
        program = binaries / f"redis-{name}"
        if program.exists():
            (place / "src" / program.name).symlink_to(program)
        elif name != "sentinel":
            raise KflexError(f"{program.name} is not installed", str(binaries), "apt install redis-tools")
    (place / "tests" / "tmp").mkdir(exist_ok=True)
    return place
