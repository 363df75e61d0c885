"""Puts a kernel beside the others, or takes one of ours away: all or nothing, whenever the process dies.

The record comes first, the boot entry last. What is cut short by a kill is undone (an installation) or
finished (a removal) by the next run.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from kflex_repro.build import cache
from kflex_repro.diagnose.events import size_text
from kflex_repro.errors import KflexError
from kflex_repro.kernel import grub, inventory
from kflex_repro.kernel.place import Layout, Root, layout
from kflex_repro.kernel.plan import Plan, menu_command, refuse_existing, require_space
from kflex_repro.kernel.record import INSTALLED, INSTALLING, REMOVING, Made, Record, Store
from kflex_repro.kernel.source import LINKS
from kflex_repro.patching import journal

Report = Callable[[str], None]
# No tool takes a name like this one for a kernel's.
_STAGE = ".kflex-repro-new-"
_OLD = ".kflex-repro-old-"
_INITRAMFS_STATE = "/var/lib/initramfs-tools"


def _silent(_line: str) -> None:
    return


def _beside(path: Path, prefix: str) -> Path:
    return path.with_name(prefix + path.name)


def _copy(source: Path, target: Path) -> None:
    """Copy a file's content, and nothing else of it: a vfat has no owners, modes or links."""
    stage = _beside(target, _STAGE)
    with source.open("rb") as old, stage.open("wb") as new:
        shutil.copyfileobj(old, new, 1 << 20)
        new.flush()
        os.fsync(new.fileno())
    stage.replace(target)
    journal.sync_directory(target.parent)


def _sync(directory: Path) -> None:
    """Write out the whole file system that holds a directory: thousands of small files at once."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        ctypes.CDLL(None).syncfs(handle)
    finally:
        os.close(handle)


def _stage_modules(plan: Plan, stage: Path) -> None:
    into = stage / "lib/modules" / plan.release
    into.parent.mkdir(parents=True)
    source = plan.source
    if source.build is not None:
        command = ["make", "-s", "-C", str(source.build), f"INSTALL_MOD_PATH={stage}", "INSTALL_MOD_STRIP=1"]
        _host([*command, "modules_install"])
        for name in LINKS:
            (into / name).unlink(missing_ok=True)
    else:
        assert source.modules is not None
        top = str(source.modules)
        shutil.copytree(
            source.modules,
            into,
            symlinks=True,
            ignore=lambda place, names: [name for name in names if place == top and name in LINKS],
        )
    if not into.is_dir():
        raise KflexError("modules_install left no modules", str(source.origin), "run make modules in it")
    if plan.depmod:
        _host([plan.depmod, "-b", str(stage), plan.release])


def _host(command: list[str]) -> None:
    """Run a program of this machine that works on the paths it is given only."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            close_fds=False,
        )
    except OSError as error:
        raise KflexError(f"cannot run {command[0]}, {error.strerror}") from None
    if done.returncode:
        said = [line for line in done.stdout.splitlines() if line.strip()] or ["it said nothing"]
        raise KflexError(f"{PurePosixPath(command[0]).name} failed, {said[-1]}", " ".join(command))


def _modules(plan: Plan) -> None:
    assert plan.modules is not None
    target = plan.root.real(plan.modules)
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = _beside(target, _STAGE)
    _stage_modules(plan, stage)
    _sync(stage)
    (stage / "lib/modules" / plan.release).rename(target)
    journal.sync_directory(target.parent)
    shutil.rmtree(stage)


def _made(plan: Plan) -> tuple[Made, ...]:
    """All that an installation makes, in that order."""
    made = [Made(plan.modules, tree=True)] if plan.modules else []
    made += [Made(copy.target, sha256=cache.file_digest(copy.source)) for copy in plan.copies]
    made.append(Made(plan.layout.initrd_path(plan.release)))
    if plan.layout.name == "debian":
        # A sum that update-initramfs keeps.
        made.append(Made(f"{_INITRAMFS_STATE}/{plan.release}"))
    return (*made, Made(plan.entry[0])) if plan.entry else tuple(made)


def install(plan: Plan, report: Report = _silent) -> tuple[str, ...]:
    """Do what a plan says; commands that are left to be run. On any failure everything is as it was."""
    require_space(plan.space)
    root, store = plan.root, Store(plan.root)
    with store.locked():
        recover(root, store, report)
        targets = [copy.target for copy in plan.copies] + [plan.modules or ""]
        refuse_existing(root, plan.release, filter(None, targets))
        origin = str(plan.source.origin)
        record = Record(
            plan.release,
            INSTALLING,
            plan.source.image.arch,
            origin,
            _made(plan),
            config=plan.layout.config if plan.entry is None else None,
            left=plan.left,
        )
        store.put(record)
        try:
            if plan.modules:
                report(f"modules: {size_text(plan.modules_size)} at most to {root.real(plan.modules)}")
                _modules(plan)
            for copy in plan.copies:
                report(f"{size_text(copy.size)} to {root.real(copy.target)}")
                _copy(copy.source, root.real(copy.target))
            if plan.initramfs:
                report(f"running {root.shown(plan.initramfs)}")
                _make_initramfs(plan)
            if plan.menu:
                report(f"running {root.shown(plan.menu)}")
                record = _make_menu(root, store, record, plan.menu)
            if plan.entry:
                _write(root.real(plan.entry[0]), plan.entry[1].encode())
            store.put(record.now(state=INSTALLED))
            _delete(root, Made(store.backup_name(plan.release)))
        except BaseException as error:
            kept = store.get(plan.release)
            # An interrupt can come after the last step: then it is done.
            if kept is not None and kept.state != INSTALLED:
                _take_down(root, store, kept, _silent)
            if isinstance(error, OSError):
                raise KflexError(
                    f"the installation failed and was undone, {error.strerror}",
                    str(error.filename or root.path),
                ) from None
            raise
    return plan.left


def _write(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace a file at once. It keeps its mode: grub's configuration may hold a password's hash."""
    stage = _beside(path, _STAGE)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        mode = path.stat().st_mode & 0o7777
    stage.unlink(missing_ok=True)
    with os.fdopen(os.open(stage, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        # A vfat has no modes.
        with contextlib.suppress(PermissionError):
            os.fchmod(stream.fileno(), mode)
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    stage.replace(path)
    journal.sync_directory(path.parent)


def _make_initramfs(plan: Plan) -> None:
    assert plan.initramfs is not None
    plan.root.run(plan.initramfs)
    path = plan.root.real(plan.layout.initrd_path(plan.release))
    if not path.is_file() or path.stat().st_size == 0:
        raise KflexError(f"{plan.initramfs[0]} made no initramfs", str(path))
    _sync(path.parent)


def _new_menu(root: Root, command: tuple[str, ...], config: str) -> tuple[bytes, str]:
    """grub's configuration as its program makes it now, and what that said. Beside: it writes in place."""
    program = command[0]
    stage = _beside(root.real(config), _STAGE)
    try:
        said = root.run((program, "-o", f"/{stage.relative_to(root.path)}"))
        return stage.read_bytes(), said
    except FileNotFoundError:
        raise KflexError(f"{program} made no configuration", str(stage)) from None
    finally:
        _delete_stages(root.real(config))


def _make_menu(root: Root, store: Store, record: Record, command: tuple[str, ...]) -> Record:
    assert record.config is not None
    path = root.real(record.config)
    new, said = _new_menu(root, command, record.config)
    if grub.find(new.decode(errors="replace"), record.image) is None:
        last = said.strip().splitlines()[-3:]
        raise KflexError(
            f"{command[0]} made no entry for {record.image}; it said: {' | '.join(last) or 'nothing'}",
            str(path),
        )
    if path.exists():
        _write(store.backup(record.release), path.read_bytes(), 0o600)
    record = record.now(config_new=journal.digest(new))
    store.put(record)
    _write(path, new, 0o600)
    return record


# -- and back


def recover(root: Root, store: Store, report: Report = _silent) -> list[str]:
    """Undo or finish what was interrupted; one line for each. The caller holds the lock."""
    lines = []
    for record in store.all():
        if record.state != INSTALLED:
            done = "removal was finished" if record.state == REMOVING else "installation was undone"
            _take_down(root, store, record, report)
            lines.append(f"{record.release}: an interrupted {done}")
            report(lines[-1])
    return lines


def _clear_variables(root: Root, place: Layout, record: Record, old: str) -> None:
    """Let no variable of grub name an entry that goes."""
    values = grub.variables(root, place.environment)
    entries = {
        item.id for item in inventory.entry_files(root) if item.fields.get("version") == record.release
    }
    for name in ("next_entry", "saved_entry"):
        value = values.get(name, "")
        if not value:
            continue
        chosen = grub.resolve(old, value) if old else None
        if value in entries or (chosen is not None and chosen.image == record.image):
            grub.set_variable(root, place.environment, name, None)


def _take_out_of_menu(root: Root, store: Store, record: Record) -> bool:
    """Make the boot loader forget a kernel, while its files are there; whether it is to be made anew."""
    place = layout(root)
    path = root.real(record.config) if record.config else None
    old = path.read_bytes() if path is not None and path.exists() else b""
    backup = store.backup(record.release)
    text = old.decode(errors="surrogateescape")
    if grub.variables(root, place.environment):
        _clear_variables(root, place, record, text)
    if path is None:
        return False
    if record.state == INSTALLING and record.config_new == journal.digest(old):
        # Nobody made it anew since: what was there comes back to the byte.
        if backup.exists():
            _write(path, backup.read_bytes())
        else:
            path.unlink()
        return False
    pruned = grub.prune(text, record.image).encode(errors="surrogateescape")
    if pruned != old:
        # From here on the menu has to be made anew, also by who comes after us.
        store.put(record.now(state=REMOVING))
        _write(path, pruned)
    return pruned != old or record.state == REMOVING


def _delete(root: Root, made: Made) -> None:
    path = root.real(made.path, follow=False)
    if made.tree:
        old, stage = _beside(path, _OLD), _beside(path, _STAGE)
        if path.exists() and not old.exists():
            path.rename(old)
        for left in (path, old, stage):
            if left.exists():
                shutil.rmtree(left)
        return
    _delete_stages(path)
    # What update-initramfs leaves where it is killed.
    path.with_name(path.name + ".new").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _delete_stages(path: Path) -> None:
    stage = _beside(path, _STAGE)
    stage.unlink(missing_ok=True)
    # grub-mkconfig's own.
    stage.with_name(stage.name + ".new").unlink(missing_ok=True)


def _take_down(root: Root, store: Store, record: Record, report: Report) -> tuple[str, ...]:
    """Everything of a record away, the boot entry first; what is left to be run."""
    stale = _take_out_of_menu(root, store, record)
    for made in reversed(record.made):
        _delete(root, made)
    left: tuple[str, ...] = ()
    if record.config:
        _delete_stages(root.real(record.config))
        if stale and root.real(record.config).exists():
            left = _renew_menu(root, record.config, report)
    _delete(root, Made(store.backup_name(record.release)))
    store.drop(record)
    return left


def _renew_menu(root: Root, config: str, report: Report) -> tuple[str, ...]:
    command = menu_command(root, layout(root))
    if command is None or not root.runs:
        return (root.shown((*command, "-o", config)),) if command else ()
    try:
        _write(root.real(config), _new_menu(root, command, config)[0])
    except KflexError as error:
        # The menu is right as it is, just not as the program would make it.
        report(str(error))
        return (root.shown((*command, "-o", config)),)
    return ()


def removal(root: Root, release: str, force: bool = False) -> Record:
    """The record of a kernel that may go. KflexError for every reason not to remove it."""
    store = Store(root)
    record = store.get(release)
    all_kernels = inventory.kernels(root)
    if record is None:
        found = next((item for item in all_kernels if item.release == release), None)
        if found is None:
            names = ", ".join(item.release for item in all_kernels if item.origin == inventory.OURS)
            raise KflexError(
                f"there is no kernel {release}",
                str(root.path),
                f"ours are: {names}" if names else "none is ours",
            )
        if found.origin:
            raise KflexError(
                f"{release} belongs to the package {found.origin}",
                str(root.path),
                "the package manager removes it",
            )
        raise KflexError(f"{release} was not installed by kflex-repro", str(root.path), "it is left alone")
    if root.is_host and os.uname().release == release:
        raise KflexError(f"{release} is running", "", "boot another kernel first")
    if record.state == INSTALLED and not any(
        item.bootable and item.release != release for item in all_kernels
    ):
        raise KflexError(f"{release} is the only kernel", str(root.path), "nothing would be left to boot")
    for made in record.made:
        path = root.real(made.path, follow=False)
        if made.sha256 and not force and path.exists() and cache.file_digest(path) != made.sha256:
            raise KflexError(
                f"{made.path} is not what was installed any more",
                str(root.path),
                "--force removes it nonetheless",
            )
    return record


def remove(root: Root, release: str, force: bool = False, report: Report = _silent) -> tuple[str, ...]:
    """Take an installation of ours away; commands that are left to be run."""
    removal(root, release, force)
    store = Store(root)
    with store.locked():
        recover(root, store, report)
        record = store.get(release)
        if record is None:
            # It was an interrupted one, and is undone now.
            return ()
        record = record.now(state=REMOVING)
        store.put(record)
        return _take_down(root, store, record, report)
