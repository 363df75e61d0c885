"""The distribution's packages, fetched into the cache: nothing is installed, and no root is needed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from kflex_repro.build import cache, toolchain
from kflex_repro.errors import Unavailable

Report = Callable[[str], None]


def candidate(name: str) -> str | None:
    """The version of a package that apt would take; None where it knows none."""
    match = re.search(r"Candidate: (\S+)", toolchain.output(["apt-cache", "policy", name]))
    return match.group(1) if match and match.group(1) != "(none)" else None


def fetch(
    name: str, version: str, runner: toolchain.Runner, log: Path, report: Report = lambda _line: None
) -> Path:
    """The package file, downloaded once; a damaged one is fetched again."""

    def download(out: Path) -> None:
        size = re.search(r"^Size: (\d+)", toolchain.output(["apt-cache", "show", f"{name}={version}"]), re.M)
        about = f" ({int(size.group(1)) / 1e6:.0f} MB)" if size else ""
        report(f"downloading {name} {version}{about}")
        # apt downloads as its own user, which must not be able to write into root's directories: as root it
        # says so in a warning and goes on.
        quiet = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
        step = f"the download of {name}"
        runner.run(step, ["apt-get", *quiet, "download", f"{name}={version}"], log, cwd=out)
        if not list(out.glob("*.deb")):
            raise toolchain.BuildError(step, "apt-get left no package file", log)

    place, _ = cache.obtain("downloads", cache.digest([name, version]), download)
    return next(place.glob("*.deb"))


def demand(name: str) -> str:
    """Like candidate, Unavailable where there is none."""
    version = candidate(name)
    if version is None:
        raise Unavailable(f"apt has no version of {name}", "", "run apt-get update first")
    return version
