"""ext4 images of this host's files, written without root: each at its own path, owned by the guest's root.

debugfs writes straight from the files into the image: no staged copy, and no owner from this host
(`mke2fs -d` keeps them).
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kflex_repro import files
from kflex_repro.errors import KflexError, Unavailable

# Bytes done, bytes in all.
Progress = Callable[[int, int], None]

_BLOCK = 4096
_INODE = 256
# What 6.1 and e2fsprogs 1.46 know. No journal: images are mounted read-only.
_FEATURES = (
    "none,ext_attr,dir_index,filetype,extent,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize"
)
_LINKS_MAX = 40
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


@dataclass
class Tree:
    """Files of this host, with every directory and link on the way to them.

    ``entries`` are by their path without links in it. What cannot be read, is gone, or is no file, directory
    or link is left out and counted. With ``public``, so is what not every user of this host may read.
    """

    public: bool = False
    entries: dict[str, os.stat_result] = field(default_factory=dict)
    left_out: int = 0

    def add(self, path: str, follow: bool = False) -> str | None:
        """Take one path in; with ``follow`` also what it links to, else a last link is taken as one.

        Its path without links; None where it was left out.
        """
        rest, at, links = path.split("/")[::-1], "/", 0
        while rest:
            part = rest.pop()
            if part == "..":
                at = at.rpartition("/")[0] or "/"
            if part in ("", ".", ".."):
                continue
            here = f"{at.rstrip('/')}/{part}"
            if not self._take(here):
                return None
            if stat.S_ISLNK(self.entries[here].st_mode) and (rest or follow):
                links += 1
                if links > _LINKS_MAX:
                    return None
                target = str(Path(here).readlink())
                at = "/" if target.startswith("/") else at
                rest += target.split("/")[::-1]
            else:
                at = here
        return at

    def add_tree(self, top: str, skip: Callable[[str], bool] = lambda _path: False) -> None:
        """Take in a directory and what is below it, except paths that ``skip`` says."""
        real = self.add(top, follow=True)
        pending = [real] if real else []
        while pending:
            directory = pending.pop()
            try:
                with os.scandir(directory) as found:
                    paths = [one.path for one in found]
            except OSError:
                self.left_out += 1
                continue
            for path in paths:
                if not skip(path) and self._take(path) and stat.S_ISDIR(self.entries[path].st_mode):
                    pending.append(path)

    def files(self) -> Iterator[str]:
        """The regular files."""
        return (path for path, status in self.entries.items() if stat.S_ISREG(status.st_mode))

    def _take(self, path: str) -> bool:
        if path in self.entries:
            return True
        try:
            status = os.lstat(path)
        except OSError:
            self.left_out += 1
            return False
        if stat.S_ISREG(status.st_mode):
            allowed = bool(status.st_mode & stat.S_IROTH) if self.public else True
            allowed = allowed and os.access(path, os.R_OK)
        else:
            allowed = stat.S_ISDIR(status.st_mode) or stat.S_ISLNK(status.st_mode)
        # debugfs reads lines.
        if not allowed or "\n" in path:
            self.left_out += 1
            return False
        self.entries[path] = status
        return True


def _blocks(path: str, status: os.stat_result) -> int:
    if stat.S_ISREG(status.st_mode):
        return -(-status.st_size // _BLOCK)
    return 1 if stat.S_ISDIR(status.st_mode) or status.st_size >= 60 else 0


def size(tree: Tree) -> int:
    """Bytes of the image that holds ``tree``."""
    blocks = sum(_blocks(path, status) for path, status in tree.entries.items())
    # Directory entries: 8 bytes and the name, padded; half as much again for what does not fit a block's end.
    names = sum(12 + len(os.fsencode(path.rpartition("/")[2])) for path in tree.entries)
    total = blocks * _BLOCK + names * 3 // 2 + _inodes(tree) * _INODE
    return -(-(total + total // 64 + (2 << 20)) // _BLOCK) * _BLOCK


def _inodes(tree: Tree) -> int:
    return len(tree.entries) + 64


def check_space(directory: Path, needed: int, what: str) -> None:
    """KflexError in one line where ``directory``'s file system has less than ``needed`` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise KflexError(
            f"no space for {what}: {needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free",
            str(directory),
            "free some space, or set KFLEX_CACHE to another place",
        )


def program(name: str) -> str:
    """The path of one of e2fsprogs' programs; Unavailable where it is not there."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{_SBIN}")
    if found is None:
        raise Unavailable(f"{name} is not installed", "", "apt install e2fsprogs")
    return found


def _quoted(path: str) -> bytes:
    return b'"' + os.fsencode(path).replace(b'"', b'""') + b'"'


def _commands(tree: Tree) -> Iterator[tuple[bytes, int]]:
    """debugfs's commands, each with the bytes that it copies."""
    at = ""
    # A directory comes before what is in it.
    for path in sorted(tree.entries, key=lambda path: path.split("/")):
        status = tree.entries[path]
        directory, _, name = path.rpartition("/")
        if directory != at:
            yield b"cd " + _quoted(directory or "/") + b"\n", 0
            at = directory
        quoted = _quoted(name)
        if stat.S_ISLNK(status.st_mode):
            yield b"symlink " + quoted + b" " + _quoted(str(Path(path).readlink())) + b"\n", 0
            continue
        if stat.S_ISDIR(status.st_mode):
            yield b"mkdir " + quoted + b"\n", 0
            mode = stat.S_IMODE(status.st_mode)
            if mode != 0o755:
                yield b"sif " + quoted + b" mode 04%04o\n" % mode, 0
            continue
        # Python's compiled files and make go by the time of change.
        line = b"write " + _quoted(path) + b" " + quoted + b"\n"
        line += b"sif " + quoted + b" mtime @%d\n" % max(int(status.st_mtime), 0)
        yield line, status.st_size


def write(image: Path, tree: Tree, progress: Progress = lambda _done, _all: None) -> None:
    """Make ``image``, a new file: an ext4 file system with what is in ``tree``. KflexError if that fails.

    Owners are root, permissions and times of change are the host's; hard links become files of their own.
    """
    mke2fs, debugfs, e2fsck = (program(name) for name in ("mke2fs", "debugfs", "e2fsck"))
    needed = size(tree)
    check_space(image.parent, needed, image.name)
    with image.open("xb") as stream:
        # What was taken from a user's files is not for others to read.
        os.fchmod(stream.fileno(), 0o600)
        try:
            os.posix_fallocate(stream.fileno(), 0, needed)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise _failed(image, error.strerror or "no space") from None
            stream.truncate(needed)
    features = ["-O", _FEATURES, "-I", str(_INODE), "-b", str(_BLOCK), "-m", "0", "-E", "nodiscard"]
    _run([mke2fs, "-q", "-F", "-t", "ext4", *features, "-N", str(_inodes(tree)), str(image)], image)
    _populate(debugfs, image, tree, progress)
    _run([e2fsck, "-f", "-n", str(image)], image)


def _failed(image: Path, reason: str) -> KflexError:
    return KflexError(
        f"cannot make {image.name}: {reason}", str(image.parent), "is the disk full or damaged?"
    )


def _environment() -> dict[str, str]:
    # debugfs would page, and a user's mke2fs.conf could ask for other features.
    return {**os.environ, "LC_ALL": "C", "MKE2FS_CONFIG": os.devnull, "DEBUGFS_PAGER": "__none__"}


def _run(command: list[str], image: Path) -> None:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=_environment(), check=False
    )
    if done.returncode != 0:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise _failed(image, lines[-1] if lines else f"{command[0]} failed")


def _populate(debugfs: str, image: Path, tree: Tree, progress: Progress) -> None:
    total = sum(count for _, count in _commands(tree))
    done = 0
    with files.in_memory("debugfs-errors") as errors:
        # Commands through a pipe: should we be killed, it ends, and debugfs with it.
        process = subprocess.Popen(
            [debugfs, "-w", "-f", "-", str(image)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=_environment(),
            process_group=0,
        )
        assert process.stdin is not None
        try:
            for line, count in _commands(tree):
                process.stdin.write(line)
                if count:
                    done += count
                    progress(done, total)
            process.stdin.close()
            code = process.wait()
        except BrokenPipeError:
            code = process.wait() or 1
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        errors.seek(0)
        # The first line is its version. A failure is another line, never the status.
        said = [line for line in errors.read().decode(errors="replace").splitlines()[1:] if line.strip()]
    if code != 0 or said:
        raise _failed(image, said[0] if said else "debugfs ended early")
