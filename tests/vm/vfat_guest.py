"""Run in a guest: a system whose /boot is the vfat in the image that is named; kernels come and go there.

Prints "done" and what it did. An assertion that fails is the guest's exit status.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from kflex_repro.errors import KflexError
from kflex_repro.kernel import install, inventory, once, plan, source
from kflex_repro.kernel.place import file_system, open_root
from kflex_repro.kernel.record import Store
from tests.unit.kernel_trees import (
    NEW,
    OLD,
    bootable,
    debian,
    entry,
    fedora,
    installed,
    killed_at,
    snapshot,
    write,
)

# Killing at every touch of the disk takes minutes here; tests/unit does that. These are in all phases.
_STEP = 9


def _mounted(work: Path, image: Path, make: object) -> Path:
    """A system made by ``make``, its /boot moved to a vfat."""
    assert callable(make)
    root = Path(make(work / "root", tools=True))
    (root / "boot").rename(work / "boot")
    (root / "boot").mkdir()
    subprocess.run(["mkfs.vfat", "-F", "32", image], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["mount", "-t", "vfat", "-o", "loop,umask=077", image, root / "boot"], check=True)
    for path in sorted((work / "boot").rglob("*")):
        target = root / "boot" / path.relative_to(work / "boot")
        target.mkdir() if path.is_dir() else target.write_bytes(path.read_bytes())
    shutil.rmtree(work / "boot")
    return root


def _come_and_go(root: Path, built: Path, work: Path) -> None:
    boot = root / "boot"
    assert file_system(boot)[0] == "vfat"
    for refused in (os.symlink, os.link):
        try:
            refused(boot / f"vmlinuz-{OLD}", boot / "link")
        except PermissionError:
            continue
        raise AssertionError("this is no vfat: it has links")
    if (boot / "grub").exists():
        # As the system's program makes it, so that the one after a removal is the same.
        open_root(root).run(["/usr/sbin/grub-mkconfig", "-o", "/boot/grub/grub.cfg"])
        (root / "var/lib/initramfs-tools").mkdir(parents=True)
    before = snapshot(root)

    made = plan.make(open_root(root), source.find(built))
    assert any("vfat: no links, owners or modes" in note for note in made.notes), made.notes
    assert install.install(made) == ()
    assert (boot / f"vmlinuz-{NEW}").read_bytes() == (built / "image").read_bytes()
    (kernel,) = (item for item in inventory.kernels(open_root(root)) if item.release == NEW)
    assert kernel.bootable and kernel.in_menu and kernel.initrd, kernel
    assert not list(root.rglob(".kflex-repro-*"))
    if kernel.origin and not (boot / "grub").exists():
        (text,) = (path.read_text() for path in (boot / "loader/entries").glob(f"*-{NEW}.conf"))
        assert f"\nlinux /vmlinuz-{NEW}\n" in text, "a path from the top of the vfat"

    # To a vfat, this is the same name.
    other = entry(work / "other", NEW.upper())
    try:
        installed(root, other)
    except KflexError as error:
        assert "does not tell it from" in str(error), error
    else:
        raise AssertionError("a kernel was written over another one")

    once.set_next(open_root(root), once.choose(open_root(root), NEW))
    assert [item.release for item in inventory.kernels(open_root(root)) if item.next] == [NEW]
    install.remove(open_root(root), NEW)
    after = snapshot(root)
    for path in ("boot/grub/grubenv", "boot/grub2/grubenv"):
        after.pop(path, None)
    assert after == before, [name for name in after if after[name] != before.get(name)]


def _killed(root: Path, built: Path) -> int:
    """Installations killed here and there; how many."""
    count, step = 0, 2
    while killed_at(step, lambda: installed(root, built)):
        assert bootable(root), step
        with Store(open_root(root)).locked():
            install.recover(open_root(root), Store(open_root(root)))
        assert bootable(root) and not list(root.rglob(".kflex-repro-*")), step
        if (root / f"boot/vmlinuz-{NEW}").exists():
            install.remove(open_root(root), NEW)
        count, step = count + 1, step + _STEP
    install.remove(open_root(root), NEW)
    return count


def main() -> None:
    image = Path(sys.argv[1])
    subprocess.run(["modprobe", "loop"], check=True)
    for module in ("vfat", "nls_cp437", "nls_ascii"):
        subprocess.run(["modprobe", module], check=True)
    killed = 0
    for make in (debian, fedora):
        work = Path(os.environ["KFLEX_OUT"]).parent / make.__name__
        work.mkdir()
        built = entry(work / "built")
        root = _mounted(work, image, make)
        _come_and_go(root, built, work)
        if make is debian:
            killed = _killed(root, built)
        subprocess.run(["umount", root / "boot"], check=True)
    assert killed >= 5, killed
    write(Path(os.environ["KFLEX_OUT"]) / "done", f"{killed}\n")
    print("done, killed", killed)


if __name__ == "__main__":
    main()
