"""A guest's root made of this host's files, without root."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kflex_repro.build import cache, objects
from kflex_repro.errors import KflexError, Unavailable
from kflex_repro.vm import ext4, kernels, rootfs, run
from tests.vm.leftovers import Watch


def _debugfs(image: Path, command: str) -> str:
    done = subprocess.run(
        [ext4.program("debugfs"), "-R", command, image], capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Files of all sorts, with names that a script of commands could trip over."""
    top = tmp_path / "top"
    (top / "a b" / 'q"uote').mkdir(parents=True)
    (top / "a b" / 'q"uote' / "-x").write_bytes(os.urandom(300_000))
    (top / "empty").touch()
    (top / "tool").write_text("#!/bin/sh\n")
    (top / "tool").chmod(0o750)
    os.utime(top / "tool", (1_700_000_000, 1_700_000_000))
    (top / "link").symlink_to("a b")
    (top / "long").symlink_to("/" + "x" * 200)
    (top / "sticky").mkdir()
    (top / "sticky").chmod(0o1777)
    os.mkfifo(top / "fifo")
    (top / "two\nlines").touch()
    many = top / "many"
    many.mkdir()
    for number in range(500):
        (many / f"file-{number:060}").write_bytes(b"%d" % number)
    return top


def test_an_image_has_what_the_tree_has(files: Path, tmp_path: Path) -> None:
    tree = ext4.Tree()
    # By way of a link: it is there, too, and leads to the same.
    (tmp_path / "way").symlink_to("top")
    tree.add_tree(f"{tmp_path}/way")
    tree.add(f"{tmp_path}/way/link/../empty")
    assert tree.left_out == 2
    image = tmp_path / "image"
    seen: list[tuple[int, int]] = []
    ext4.write(image, tree, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    # As much space as is said, and all of it taken from the start.
    assert image.stat().st_size == ext4.size(tree)
    assert image.stat().st_mode & 0o777 == 0o600
    back = tmp_path / "back"
    back.mkdir()
    _debugfs(image, f'rdump "{tmp_path}" {back}')
    (files / "fifo").unlink()
    (files / "two\nlines").unlink()
    done = subprocess.run(
        ["diff", "-r", "--no-dereference", files, back / tmp_path.name / "top"], check=False
    )
    assert done.returncode == 0
    assert (back / tmp_path.name / "way").readlink() == Path("top")
    tool = _debugfs(image, f'stat "{files}/tool"')
    assert "Mode:  0750" in tool and "mtime: 0x6553f100" in tool
    for path in ("tool", "sticky", "link"):
        assert "User:     0   Group:     0" in _debugfs(image, f'stat "{files}/{path}"')
    assert "Mode:  01777" in _debugfs(image, f'stat "{files}/sticky"')


def test_what_not_everyone_may_read_is_left_out(files: Path) -> None:
    tree = ext4.Tree(public=True)
    for name in ("tool", "empty", "gone"):
        tree.add(str(files / name))
    assert str(files / "empty") in tree.entries
    assert str(files / "tool") not in tree.entries
    assert tree.left_out == 2


def test_a_file_that_goes_meanwhile_is_said(files: Path, tmp_path: Path) -> None:
    tree = ext4.Tree()
    tree.add_tree(str(files))
    (files / "empty").unlink()
    with pytest.raises(KflexError, match=r"cannot make image: .*No such file"):
        ext4.write(tmp_path / "image", tree)


def test_the_packages_of_the_guest_are_complete() -> None:
    tree = rootfs._base_tree(rootfs._base())
    names = {path.rpartition("/")[2] for path in tree.entries}
    for program in ("bash", "redis-server", "ip", "nft", "clang", "gcc", "strace", "mount", "awk", "cc"):
        found = shutil.which(program)
        assert found is not None, program
        assert program in names
        # Every link on the way is there, to the program itself, and every library that it names.
        real = os.path.realpath(found)
        assert real in tree.entries
        pending, seen = [real], set()
        while pending:
            for library in rootfs._needed(pending.pop()):
                assert library in names, (program, library)
                if library not in seen and (place := rootfs._known_libraries().get(library)):
                    seen.add(library)
                    pending.append(place)
    assert "/etc/passwd" in tree.entries and "/etc/alternatives/cc" in tree.entries
    for secret in ("/etc/shadow", "/etc/gshadow", "/etc/ssh"):
        assert not any(path.startswith(secret) for path in tree.entries)
    for link in ("/bin", "/lib"):
        assert (link in tree.entries) == Path(link).exists()
        if Path(link).is_symlink():
            assert not any(path.startswith(f"{link}/") for path in tree.entries)


def test_an_edit_changes_the_least_of_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    top = objects.source_root()
    for name in ("bpf", "kflex_repro"):
        shutil.copytree(top / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / ".git").mkdir()
    (source / ".git" / "secret").touch()
    (source / "results").mkdir()
    monkeypatch.setenv("KFLEX_SOURCE", str(source))

    def key() -> str:
        return rootfs._work_key(rootfs._work_tree(()))

    first = key()
    file = source / "bpf" / "new.h"
    file.write_text("/* */\n")
    second = key()
    assert second != first
    # Not of what is made in passing, nor of a time alone.
    os.utime(file, (1, 1))
    (source / "kflex_repro" / "__pycache__").mkdir()
    (source / "kflex_repro" / "__pycache__" / "x.pyc").touch()
    assert key() == second
    paths = rootfs._work_tree(()).entries
    assert str(file) in paths
    # The package that runs, too, though it lies elsewhere.
    assert str(top / "kflex_repro" / "cli.py") in paths
    assert not [path for path in paths if path.startswith((f"{source}/.git/", f"{source}/results"))]
    # Not of the sources: the other two.
    assert rootfs._base().key == rootfs._base().key
    assert not [path for path in rootfs._python_tree().entries if path.startswith(str(source))]


def test_only_the_images_used_last_are_kept(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}").mkdir()
        os.utime(tmp_path / f"{number}", (number, number))
    (tmp_path / ".being-made").mkdir()
    rootfs._prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".being-made", "2", "3"]


def test_a_host_without_debians_packages_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    rootfs._installed.cache_clear()
    with pytest.raises(Unavailable, match=r"Debian's or Ubuntu's packages.*--root virtiofs"):
        rootfs._installed()


def test_killed_while_writing(tmp_path: Path) -> None:
    """Nothing runs on, and the next to want the image finds a clean place."""
    big = tmp_path / "big"
    big.mkdir()
    for number in range(40):
        with (big / str(number)).open("wb") as stream:
            stream.truncate(8 << 20)
            stream.write(b"x")
    code = (
        "import sys\nfrom kflex_repro.build import cache\nfrom kflex_repro.vm import ext4\n"
        f"tree = ext4.Tree(); tree.add_tree({str(big)!r})\n"
        "say = lambda done, total: print(done, flush=True)\n"
        "cache.obtain('test', 'key', lambda out: ext4.write(out / 'image', tree, say))\n"
    )
    (tmp_path / "cache").mkdir()
    watch = Watch(tmp_path / "tmp", tmp_path / "cache", own=True)
    process = subprocess.Popen([sys.executable, "-c", code], env=watch.env, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = list((tmp_path / "cache" / "test").iterdir())
    assert [path.name.startswith(".key-") for path in left] == [True]
    subprocess.run([sys.executable, "-c", code], env=watch.env, stdout=subprocess.DEVNULL, check=True)
    assert [path.name for path in (tmp_path / "cache" / "test").iterdir()] == ["key"]
    assert not watch.processes()


def test_a_guest_of_images(stock: kernels.Kernel, tmp_path: Path) -> None:
    """Our Python, our sources, Debian's programs, what was taken along; nobody's secrets."""
    (tmp_path / "mine").write_text("taken\n")
    script = (
        "set -e; cat mine; stat -c %U:%G /bin/sh mine /etc/passwd; test ! -e /etc/shadow; "
        'test "$(readlink /bin)" = "$HERE_BIN"; '
        "redis-server --port 7000 --save '' --daemonize yes >/dev/null; "
        "until redis-cli -p 7000 ping 2>/dev/null; do sleep 0.1; done; "
        f"cd {objects.source_root()}; "
        f"{sys.executable} -c 'import kflex_repro.vm.run, redis; print(redis.__name__)'; "
        "echo x >/usr/bin/x; echo done"
    )
    link = str(Path("/bin").readlink()) if Path("/bin").is_symlink() else ""
    request = run.Request(
        ("bash", "-c", script),
        accel="tcg",
        root="image",
        cwd=tmp_path,
        take=(tmp_path,),
        env={"HERE_BIN": link},
        timeout=240,
    )
    out, err = bytearray(), bytearray()
    outcome = run.run(request, out.extend, err.extend)
    assert outcome.status == 0, err.decode()
    assert out.decode().split() == ["taken", "root:root", "root:root", "root:root", "PONG", "redis", "done"]
    assert outcome.root == "image"
    assert not Path("/usr/bin/x").exists()
    assert all(cache.intact(image.parent) for image in run.layers(request, stock))
