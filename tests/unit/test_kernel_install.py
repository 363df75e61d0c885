"""A kernel installed beside a distribution's, in trees of several: all of it or nothing, and away again."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import shutil
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from kflex_repro.errors import KflexError
from kflex_repro.kernel import cli, install, inventory, once, plan, source
from kflex_repro.kernel.place import open_root
from kflex_repro.kernel.record import PLACE, Store
from tests.conftest import require
from tests.cut_short import small_disk
from tests.unit.kernel_trees import (
    MACHINE,
    NEW,
    OLD,
    bootable,
    bzimage,
    debian,
    entry,
    fedora,
    grub_config,
    installed,
    killed_at,
    modules,
    openeuler,
    riscv_image,
    snapshot,
    write,
)

LAYOUTS = {"debian": debian, "fedora": fedora, "openeuler": openeuler}


def tool_tree(root: Path, layout: str) -> Path:
    """A tree whose own programs can be run."""
    require("root")  # chroot
    return LAYOUTS[layout](root, tools=True)


def run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(cli.group, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.stdout


@pytest.fixture
def built(tmp_path: Path) -> Path:
    return entry(tmp_path / "built")


@pytest.mark.parametrize("name", LAYOUTS)
def test_installed_by_the_systems_own_programs_and_away_again(tmp_path: Path, built: Path, name: str) -> None:
    root = tool_tree(tmp_path / "root", name)
    before = snapshot(root)
    assert installed(root, built) == ()

    boot = root / "boot"
    assert (boot / f"vmlinuz-{NEW}").read_bytes() == (built / "image").read_bytes()
    assert (boot / f"config-{NEW}").exists() and (boot / f"System.map-{NEW}").exists()
    initrd = boot / (f"initrd.img-{NEW}" if name == "debian" else f"initramfs-{NEW}.img")
    assert initrd.read_text() == f"initramfs of {NEW}\n"
    directory = root / "lib/modules" / NEW
    assert (directory / "kernel/net/kflex.ko").exists()
    assert (directory / "modules.dep").exists(), "depmod was run"
    assert not (directory / "build").is_symlink(), "a link to where it was built"
    if name == "fedora":
        text = (boot / f"loader/entries/{MACHINE}-{NEW}.conf").read_text()
        assert f"\nlinux /boot/vmlinuz-{NEW}\ninitrd /boot/initramfs-{NEW}.img\n" in text
        assert "\noptions root=UUID=1234 ro rhgb quiet\n" in text
    by_release = {item.release: item for item in inventory.kernels(open_root(root))}
    assert by_release[NEW].origin == "kflex-repro" and by_release[NEW].in_menu and by_release[NEW].bootable
    assert by_release[OLD].origin == (f"linux-image-{OLD}" if name == "debian" else "")
    assert not list(root.rglob(".kflex-repro-*"))

    assert install.remove(open_root(root), NEW) == ()
    after = snapshot(root)
    config = {"debian": "boot/grub/grub.cfg", "openeuler": "boot/efi/EFI/openEuler/grub.cfg"}.get(name, "")
    for tree in (before, after):
        tree.pop(config, None)
        tree.pop("var/lib/initramfs-tools", None)
    assert after == before
    if config:
        text = (root / config).read_text()
        assert OLD in text and NEW not in text


_MAKEFILE = """
modules_install:
\t@[ "$(INSTALL_MOD_STRIP)" = 1 ] || exit 2
\t@[ ! -e broken ] || { echo "no rule for kflex.ko" >&2; exit 2; }
\t@mkdir -p $(INSTALL_MOD_PATH)/lib/modules/%s/kernel/net
\t@cp net/kflex.ko $(INSTALL_MOD_PATH)/lib/modules/%s/kernel/net/
\t@ln -s $(CURDIR) $(INSTALL_MOD_PATH)/lib/modules/%s/build
"""


def built_tree(place: Path) -> Path:
    """A kernel's build tree, built."""
    write(place / "Makefile", _MAKEFILE % (NEW, NEW, NEW))
    write(place / "Kconfig", "")
    write(place / ".config", "CONFIG_MODULES=y\n")
    write(place / "System.map", "ffffffff81000000 T _text\n")
    write(place / "arch/x86/boot/bzImage", bzimage(NEW))
    write(place / "include/config/kernel.release", NEW + "\n")
    write(place / "modules.order", "net/kflex.o\n")
    write(place / "net/kflex.ko", b"\x7fELF" + bytes(5000))
    return place


def test_a_build_tree_installs_its_modules_itself(tmp_path: Path) -> None:
    root, tree = debian(tmp_path / "root"), built_tree(tmp_path / "linux")
    before = snapshot(root)
    (tree / "broken").touch()
    with pytest.raises(KflexError, match=r"make failed, .*Error 2"):
        installed(root, tree)
    assert snapshot(root) == before
    (tree / "broken").unlink()
    installed(root, tree)
    directory = root / "lib/modules" / NEW
    assert (directory / "kernel/net/kflex.ko").exists() and (directory / "modules.dep").exists()
    assert not (directory / "build").is_symlink()
    assert (root / f"boot/config-{NEW}").read_text() == "CONFIG_MODULES=y\n"
    install.remove(open_root(root), NEW)
    assert snapshot(root) == before


def test_what_rpm_owns_is_not_touched(tmp_path: Path, built: Path) -> None:
    root = tool_tree(tmp_path / "root", "fedora")
    rpm = f'#!/bin/sh\ncase "$*" in */lib/modules/{OLD}) echo kernel-core ;; *) echo no; exit 1 ;; esac\n'
    write(root / "usr/bin/rpm", rpm, 0o755)
    installed(root, built)
    assert {item.release: item.origin for item in inventory.kernels(open_root(root))} == {
        OLD: "kernel-core",
        NEW: "kflex-repro",
    }
    with pytest.raises(KflexError, match="belongs to the package kernel-core"):
        installed(root, entry(tmp_path / "same", OLD))


@pytest.mark.parametrize("name", LAYOUTS)
def test_without_the_systems_programs_what_is_left_is_said(tmp_path: Path, built: Path, name: str) -> None:
    root = LAYOUTS[name](tmp_path / "root")
    before = snapshot(root)
    left = installed(root, built)
    assert (root / f"boot/vmlinuz-{NEW}").exists()
    if name == "fedora":
        assert left == ()
        assert "initrd" not in (root / f"boot/loader/entries/{MACHINE}-{NEW}.conf").read_text()
    else:
        (line,) = left
        assert "grub.cfg anew" in line
        assert snapshot(root)[open_config(root)] == before[open_config(root)]
    assert run("list", "--root", root).count("was left to be run") == len(left)
    install.remove(open_root(root), NEW)
    assert snapshot(root) == before


def open_config(root: Path) -> str:
    from kflex_repro.kernel.place import layout

    return str(layout(open_root(root)).config)[1:]


def test_deferred_the_commands_are_printed_and_none_is_run(tmp_path: Path, built: Path) -> None:
    root = debian(tmp_path / "root", tools=True)
    left = installed(root, built, defer=True)
    assert left == (
        f"chroot {root} /usr/sbin/update-initramfs -c -k {NEW}",
        f"chroot {root} /usr/sbin/grub-mkconfig -o /boot/grub/grub.cfg",
    )
    assert not (root / f"boot/initrd.img-{NEW}").exists()


def test_a_dry_run_lists_every_file_and_changes_nothing(tmp_path: Path, built: Path) -> None:
    root = debian(tmp_path / "root", tools=True)
    before = snapshot(root)
    said = run("install", built, "--root", root, "--dry-run")
    for name in (
        f"/boot/vmlinuz-{NEW}",
        f"/boot/config-{NEW}",
        f"/boot/System.map-{NEW}",
        f"/lib/modules/{NEW}/",
    ):
        assert f"would create  {name}" in said
    assert f"chroot {root} /usr/sbin/update-initramfs -c -k {NEW}" in said
    facts = json.loads(run("install", built, "--root", root, "--dry-run", "--json"))
    assert [item["to"] for item in facts["files"]][-1] == f"/boot/vmlinuz-{NEW}"
    assert facts["files"][-1]["bytes"] == (built / "image").stat().st_size
    assert snapshot(root) == before
    assert not (root / PLACE[1:]).exists()


def test_a_removal_s_dry_run_changes_nothing(tmp_path: Path, built: Path) -> None:
    root = debian(tmp_path / "root")
    installed(root, built)
    before = snapshot(root)
    said = run("remove", NEW, "--root", root, "--dry-run")
    assert f"would remove  /boot/vmlinuz-{NEW}" in said and f"would remove  /lib/modules/{NEW}" in said
    assert json.loads(run("remove", NEW, "--root", root, "--dry-run", "--json"))["release"] == NEW
    assert snapshot(root) == before


# -- refused


def _riscv(root: Path, built: Path) -> None:
    write(built / "image", riscv_image(NEW))
    write(root / "bin/sh", b"\x7fELF" + bytes(14) + struct.pack("<H", 62), 0o755)


def _packaged(root: Path, _built: Path) -> None:
    write(
        root / f"var/lib/dpkg/info/linux-image-{NEW}.list", f"/boot/vmlinuz-{NEW}\n/usr/lib/modules/{NEW}\n"
    )


def _somebodys(root: Path, _built: Path) -> None:
    write(root / f"boot/vmlinuz-{NEW}", bzimage(NEW))


def _somebodys_modules(root: Path, _built: Path) -> None:
    modules(root, NEW)


def _ours(root: Path, built: Path) -> None:
    installed(root, built)


def _damaged_record(root: Path, _built: Path) -> None:
    write(root / f"{PLACE[1:]}/{NEW}.json", "{}")


def _no_boot(root: Path, _built: Path) -> None:
    (root / "boot").rename(root / "boat")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_riscv, "the kernel is for riscv64, the system for x86_64"),
        (_packaged, f"{NEW} belongs to the package linux-image-{NEW}"),
        (_somebodys, f"/boot/vmlinuz-{NEW} is there already, and not of an installation of ours"),
        (_somebodys_modules, f"/lib/modules/{NEW} is there already"),
        (_ours, f"{NEW} is installed already"),
        (_damaged_record, "the record of an installed kernel is damaged"),
        (_no_boot, "there is no boot directory"),
    ],
)
def test_what_may_not_be_installed_is_refused_with_nothing_changed(
    tmp_path: Path, built: Path, spoil: Callable[[Path, Path], None], message: str
) -> None:
    root = debian(tmp_path / "root")
    spoil(root, built)
    before = snapshot(root)
    with pytest.raises(KflexError, match=message):
        installed(root, built)
    assert snapshot(root) == before


def test_links_of_a_tree_do_not_lead_out_of_it(tmp_path: Path, built: Path) -> None:
    root = debian(tmp_path / "root")
    outside = tmp_path / "outside"
    (root / "lib").rename(root / "usr-lib")
    (root / "usr").mkdir()
    (root / "usr-lib").rename(root / "usr/lib")
    (root / "lib").symlink_to("/usr/lib")
    (root / "boot").rename(root / "efi")
    (root / "boot").symlink_to(f"../../..{outside}/../../../../../../../efi")
    installed(root, built)
    assert (root / "usr/lib/modules" / NEW).is_dir() and (root / f"efi/vmlinuz-{NEW}").exists()
    install.remove(open_root(root), NEW)
    assert not (root / "usr/lib/modules" / NEW).exists()
    (root / "boot").unlink()
    (root / "boot").symlink_to("boot")
    with pytest.raises(KflexError, match="a loop of symbolic links"):
        installed(root, built)


def _not_there(_root: Path) -> str:
    return "5.0.0"


def _of_a_package(_root: Path) -> str:
    return OLD


def _by_hand(root: Path) -> str:
    write(root / "boot/vmlinuz-6.9.0-mine", bzimage("6.9.0-mine"))
    return "6.9.0-mine"


def _only(root: Path) -> str:
    (root / f"boot/vmlinuz-{OLD}").unlink()
    return NEW


def _replaced(root: Path) -> str:
    write(root / f"boot/vmlinuz-{NEW}", bzimage(NEW, size=50_000))
    return NEW


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (_not_there, f"there is no kernel 5.0.0 .*ours are: {NEW}"),
        (_of_a_package, f"belongs to the package linux-image-{OLD}"),
        (_by_hand, "was not installed by kflex-repro"),
        (_only, f"{NEW} is the only kernel"),
        (_replaced, "is not what was installed any more"),
    ],
)
def test_what_may_not_be_removed_stays(
    tmp_path: Path, built: Path, which: Callable[[Path], str], message: str
) -> None:
    root = debian(tmp_path / "root")
    installed(root, built)
    release = which(root)
    before = snapshot(root)
    with pytest.raises(KflexError, match=message):
        install.remove(open_root(root), release)
    assert snapshot(root) == before


def test_the_running_kernel_stays(tmp_path: Path, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = debian(tmp_path / "root")
    installed(root, built)
    release = os.uname_result(("Linux", "host", NEW, "#1", "x86_64"))
    monkeypatch.setattr("os.uname", lambda: release)
    monkeypatch.setattr("kflex_repro.kernel.place.Root.is_host", property(lambda _self: True))
    with pytest.raises(KflexError, match=f"{NEW} is running"):
        install.removal(open_root(root), NEW)
    (item,) = (item for item in inventory.kernels(open_root(root)) if item.running)
    assert item.release == NEW


def test_space_is_asked_for_before_anything_is_written(
    tmp_path: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = debian(tmp_path / "root", tools=True)
    before = snapshot(root)
    monkeypatch.setattr(plan, "free", lambda _path: 100_000)
    figures = r"MiB are needed on /boot, 97.7 KiB are free .*initrd.img-6.12.9-kflex \(estimated\) 12 KiB"
    with pytest.raises(KflexError, match=figures):
        installed(root, built)
    with pytest.raises(KflexError, match=figures):
        run("install", built, "--root", root, "--dry-run")
    assert snapshot(root) == before


def test_a_full_disk_is_refused_or_undone(
    tmp_path: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("root")  # mounts a small file system
    with small_disk("400k") as place:
        root = debian(place / "root")
        before = snapshot(root)
        with pytest.raises(
            KflexError, match=r"[\d.]+ MiB are needed on /boot, [\d.]+ KiB are free .*modules"
        ):
            installed(root, built)
        assert snapshot(root) == before
        # Somebody else took the rest after we had looked.
        write(built / "image", bzimage(NEW, size=400_000))
        monkeypatch.setattr(plan, "free", lambda _path: 1 << 40)
        with pytest.raises(KflexError, match="failed and was undone, No space left"):
            installed(root, built)
        assert snapshot(root) == before
        assert Store(open_root(root)).all() == []


def test_a_program_that_fails_leaves_everything_as_it_was(tmp_path: Path, built: Path) -> None:
    root = tool_tree(tmp_path / "root", "debian")
    write(root / "fail", "")
    before = snapshot(root)
    with pytest.raises(
        KflexError, match="grub-mkconfig failed with 1, grub-probe: error: cannot find a device"
    ):
        installed(root, built)
    after = snapshot(root)
    after.pop("var/lib/initramfs-tools", None)
    assert after == before


def test_a_program_of_a_tree_sees_no_disk_and_leaves_no_mount(tmp_path: Path) -> None:
    root = tool_tree(tmp_path / "root", "debian")
    before, mounts = snapshot(root), Path("/proc/self/mountinfo").read_text()
    said = open_root(root).run(["/bin/sh", "-c", "echo /dev/* /proc/self/exe; echo x >/dev/null; echo $$"])
    assert said.split()[:6] == [
        f"/dev/{name}" for name in ("fd", "full", "null", "random", "urandom", "zero")
    ]
    assert snapshot(root) == before
    assert str(root) not in Path("/proc/self/mountinfo").read_text() and str(root) not in mounts


def test_a_program_that_outlives_a_killed_installation_keeps_the_next_one_out(
    tmp_path: Path, built: Path
) -> None:
    root = tool_tree(tmp_path / "root", "debian")
    os.mkfifo(root / "begun")
    os.mkfifo(root / "go")
    write(root / "usr/sbin/update-initramfs", "#!/bin/sh\necho >/begun\ncat /go\n", 0o755)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            installed(root, built)
        os._exit(0)
    (root / "begun").read_bytes()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        with pytest.raises(KflexError, match="another kflex-repro is changing this system's kernels"):
            installed(root, built)
    finally:
        (root / "go").write_bytes(b"")
    # It ends when it has read that; the lock says when.
    with (root / f"{PLACE[1:]}/lock").open() as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
    assert not (root / f"boot/initrd.img-{NEW}").exists()
    with Store(open_root(root)).locked():
        lines = install.recover(open_root(root), Store(open_root(root)))
    assert lines == [f"{NEW}: an interrupted installation was undone"]
    assert not (root / f"boot/vmlinuz-{NEW}").exists()


def test_a_menu_without_the_kernel_is_a_failure(tmp_path: Path, built: Path) -> None:
    root = tool_tree(tmp_path / "root", "debian")
    write(root / "usr/sbin/grub-mkconfig", '#!/bin/sh\necho "menuentry x {\n}" >"$2"\n', 0o755)
    before = snapshot(root)["boot/grub/grub.cfg"]
    with pytest.raises(KflexError, match="made no entry for vmlinuz-"):
        installed(root, built)
    assert snapshot(root)["boot/grub/grub.cfg"] == before
    assert not (root / f"boot/vmlinuz-{NEW}").exists()


def test_a_second_process_is_kept_out(tmp_path: Path, built: Path) -> None:
    root = debian(tmp_path / "root")
    with Store(open_root(root)).locked(), pytest.raises(KflexError, match="another kflex-repro"):
        installed(root, built)


# -- the next boot


@pytest.mark.parametrize("name", ["debian", "fedora"])
def test_one_boot_of_another_kernel_is_chosen_and_taken_back(tmp_path: Path, built: Path, name: str) -> None:
    root = LAYOUTS[name](tmp_path / "root")
    installed(root, built)
    if name == "debian":
        write(root / "boot/grub/grub.cfg", grub_config([NEW, OLD], default="1>2"))
    expected = {
        "debian": f"gnulinux-advanced-UUID>gnulinux-{NEW}-advanced-UUID",
        "fedora": f"{MACHINE}-{NEW}",
    }
    environment = root / ("boot/grub/grubenv" if name == "debian" else "boot/grub2/grubenv")
    assert expected[name] in run("boot-once", NEW, "--root", root, "--dry-run")
    assert not environment.exists()
    facts = json.loads(run("boot-once", NEW, "--root", root, "--json"))
    assert facts["selector"] == expected[name]
    assert f"next_entry={expected[name]}\n" in environment.read_text()
    listed = {item["release"]: item for item in json.loads(run("list", "--root", root, "--json"))}
    assert listed[NEW]["next"] and not listed[OLD]["next"]
    if name == "debian":
        assert listed[OLD]["default"] and not listed[NEW]["default"]

    assert "taken back" in run("boot-once", "--clear", "--root", root)
    assert "next_entry" not in environment.read_text()
    assert "nothing was chosen" in run("boot-once", "--clear", "--root", root)

    run("boot-once", NEW, "--root", root)
    install.remove(open_root(root), NEW)
    assert "next_entry" not in environment.read_text(), "it would name an entry that is gone"


def _no_kernel(root: Path) -> str:
    return "5.0.0"


def _not_in_menu(root: Path) -> str:
    return NEW


def _not_taken_back(root: Path) -> str:
    write(root / "boot/grub/grub.cfg", grub_config([NEW, OLD], once=False))
    return NEW


def _systemd_boot(root: Path) -> str:
    shutil.rmtree(root / "boot/grub")
    write(root / f"boot/loader/entries/{MACHINE}-{NEW}.conf", f"version {NEW}\nlinux /vmlinuz-{NEW}\n")
    return NEW


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (_no_kernel, "there is no kernel 5.0.0 to boot"),
        (_not_in_menu, f"{NEW} is not in grub's menu .*grub-mkconfig -o /boot/grub/grub.cfg"),
        (_not_taken_back, "GRUB_DEFAULT=saved in /etc/default/grub"),
        (_systemd_boot, f"bootctl set-oneshot {MACHINE}-{NEW}.conf"),
    ],
)
def test_a_boot_that_cannot_be_for_once_is_refused(
    tmp_path: Path, built: Path, which: Callable[[Path], str], message: str
) -> None:
    root = debian(tmp_path / "root")
    installed(root, built)
    release = which(root)
    with pytest.raises(KflexError, match=message):
        once.choose(open_root(root), release)


def test_grub_that_cannot_write_is_no_boot_for_once(
    tmp_path: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = debian(tmp_path / "root")
    installed(root, built)
    write(root / "boot/grub/grub.cfg", grub_config([NEW, OLD]))
    for kind, device in (("btrfs", "/dev/vda1"), ("ext4", "/dev/mapper/vg-root")):
        monkeypatch.setattr(once, "file_system", lambda _path, found=(kind, device): found)
        assert once.choose(open_root(root), NEW).selector, (
            "a directory says nothing of the disk it will be on"
        )
        with monkeypatch.context() as context:
            context.setattr(once, "_is_a_machines", lambda _root: True)
            with pytest.raises(KflexError, match=f"cannot write on {kind} on {device}"):
                once.choose(open_root(root), NEW)


def test_a_boot_that_is_not_mounted_is_not_written_to(
    tmp_path: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = debian(tmp_path / "root")
    write(root / "etc/fstab", "# /dev/vda1 /boot ext4\nUUID=1 / ext4 defaults 0 1\n")
    place = open_root(root)
    monkeypatch.setattr("kflex_repro.kernel.place.Root.is_host", property(lambda _self: True))
    monkeypatch.setattr("kflex_repro.kernel.image.machine", lambda _root: "x86_64")
    assert plan.make(place, source.find(built)).release == NEW
    write(root / "etc/fstab", "UUID=1 / ext4 defaults 0 1\nUUID=2 /boot vfat umask=077 0 2\n")
    with pytest.raises(KflexError, match="has a file system for /boot, and it is not mounted"):
        plan.make(place, source.find(built))


# -- killed anywhere


@pytest.mark.parametrize("what", ["install", "remove"])
@pytest.mark.parametrize("name", ["debian", "fedora"])
def test_killed_at_any_point_the_old_system_boots_and_the_next_run_tidies_up(
    tmp_path: Path, built: Path, name: str, what: str
) -> None:
    start = tool_tree(tmp_path / "start", name)
    if name == "debian":
        # As its program makes it, so that the one made after a removal is the same.
        open_root(start).run(["/usr/sbin/grub-mkconfig", "-o", "/boot/grub/grub.cfg"])
        (start / "var/lib/initramfs-tools").mkdir(parents=True)
    old = snapshot(start)
    if what == "remove":
        installed(start, built)
        assert snapshot(start) != old

    step, seen = 0, set()
    while True:
        step += 1
        place = tmp_path / "killed"
        shutil.copytree(start, place, symlinks=True)
        root = open_root(place)

        def change(place: Path = place) -> None:
            if what == "install":
                installed(place, built)
            else:
                install.remove(open_root(place), NEW)

        killed = killed_at(step, change)
        assert bootable(place), f"not bootable after a kill at step {step}"
        states = [record.state for record in Store(root).all()]
        with Store(root).locked():
            install.recover(root, Store(root))
        now = snapshot(place)
        assert bootable(place) and not list(place.rglob(".kflex-repro-*"))
        is_new = (place / f"boot/vmlinuz-{NEW}").exists()
        assert [record.state for record in Store(root).all()] == (["installed"] if is_new else [])
        if not is_new:
            assert now == old, f"not the old system after a kill at step {step} in {states}"
        seen.add(is_new)
        # Fit for use: what was interrupted can be done.
        if not is_new and what == "install" and step % 5 == 0:
            change()
            assert (place / f"boot/vmlinuz-{NEW}").exists()
        shutil.rmtree(place)
        if not killed:
            break
    assert step > 12
    assert seen == {True, False}


def test_an_interrupted_installation_undoes_itself(tmp_path: Path, built: Path) -> None:
    start = tool_tree(tmp_path / "start", "debian")
    (start / "var/lib/initramfs-tools").mkdir(parents=True)
    old = snapshot(start)
    step, seen = 0, set()
    while True:
        step += 3
        place = tmp_path / "interrupted"
        shutil.copytree(start, place, symlinks=True)
        interrupted = killed_at(step, functools.partial(installed, place, built), kill=False)
        (record,) = Store(open_root(place)).all() or (None,)
        seen.add(record is None)
        assert (record.state == "installed") if record else snapshot(place) == old, step
        shutil.rmtree(place)
        if not interrupted:
            break
    assert seen == {True, False}
