"""A static busybox: what a guest starts with, and what makes its archive and indexes its modules."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from kflex_repro.build import cache, packages, toolchain
from kflex_repro.errors import Unavailable

_PACKAGE = "busybox-static"


def _static(program: Path) -> bool:
    try:
        with program.open("rb") as stream:
            return all(segment["p_type"] != "PT_INTERP" for segment in ELFFile(stream).iter_segments())
    except (OSError, ELFError):
        return False


@functools.cache
def path() -> str:
    """The system's, if it is static; else the distribution's package, unpacked into the cache.

    Not installed: busybox-static would replace the package busybox. Unavailable where there is none.
    """
    found = shutil.which("busybox")
    if found and _static(Path(found)):
        return found
    version = packages.candidate(_PACKAGE)
    if version is None:
        raise Unavailable("no static busybox found", found or "", f"apt install {_PACKAGE}")

    def unpack(out: Path) -> None:
        log = toolchain.log_path("busybox", cache.digest([version]))
        runner = toolchain.Runner()
        package = packages.fetch(_PACKAGE, version, runner, log)
        runner.run(_PACKAGE, ["dpkg-deb", "-x", package, out / "all"], log)
        shutil.copy(next(one for one in (out / "all").rglob("busybox") if one.is_file()), out / "busybox")
        shutil.rmtree(out / "all")

    place, _ = cache.obtain("busybox", cache.digest([version]), unpack)
    return str(place / "busybox")
