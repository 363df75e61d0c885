"""`kernel install` on a real vfat: in a guest, as few hosts of tests may mount one."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from kflex_repro.build.objects import source_root
from kflex_repro.vm.run import Request, run
from tests.conftest import unavailable
from tests.vm import disk


def test_kernels_come_and_go_on_a_vfat(tmp_path: Path) -> None:
    tools = [Path(found) for name in ("mkfs.vfat", "grub-editenv") if (found := shutil.which(name))]
    if len(tools) != 2:
        unavailable("mkfs.vfat and grub-editenv are needed: packages dosfstools, grub-common")
    # A guest whose root is an image has what the toolkit itself needs, not these. /lib is a link there.
    needed = [path.parent.resolve() / path.name for tool in tools for path in (tool, *disk.libraries(tool))]
    image = tmp_path / "boot.fat"
    with image.open("wb") as stream:
        stream.truncate(48 << 20)
    said: list[bytes] = []
    request = Request(
        (sys.executable, "-m", "tests.vm.vfat_guest", str(image)),
        cwd=source_root(),
        take=(source_root() / "tests", image, *needed),
        memory=1 << 30,
        timeout=300,
        out=tmp_path / "out",
    )
    outcome = run(request, stdout=said.append, stderr=said.append)
    output = b"".join(said).decode(errors="replace")
    assert outcome.status == 0, output[-4000:]
    assert int((tmp_path / "out/done").read_text()) >= 5, output
