"""grub's configuration as grub-mkconfig writes it, and the block of variables beside it."""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kflex_repro.errors import KflexError, Unavailable
from kflex_repro.kernel.place import Root

_HEAD = re.compile(r"^[ \t]*(menuentry|submenu)\s", re.M)
_QUOTED = re.compile(r"\\.|'[^']*'|\"(?:\\.|[^\"\\])*\"|#[^\n]*", re.S)
_DEFAULT = re.compile(r"^\s*set\s+default=(\"[^\"]*\"|'[^']*'|\S+)\s*$", re.M)
_ENVIRONMENT_SIZE = 1024


@dataclass(frozen=True)
class Entry:
    """One menu entry; ``id`` is what grub calls it, ``image`` the kernel's file name ("" for anything else).

    ``start`` and ``end`` are its place in the text, whole lines; ``parents`` the submenus around it, the
    outermost first.
    """

    title: str
    id: str
    image: str
    command_line: str
    start: int
    end: int
    parents: tuple[Entry, ...] = ()
    children: tuple[Entry, ...] = ()
    is_submenu: bool = False

    @property
    def selector(self) -> str:
        """What grub-reboot takes for it; a > in a name is doubled."""
        return ">".join(item.id.replace(">", ">>") for item in (*self.parents, self))

    @property
    def is_recovery(self) -> bool:
        words = self.command_line.split()
        return "recovery" in self.id or "single" in words or "(recovery mode)" in self.title


def _block_end(text: str, opening: int) -> int:
    """Where the block opened by the brace at ``opening`` ends, after its brace."""
    depth, at = 0, opening
    while at < len(text):
        quoted = _QUOTED.match(text, at)
        # A # inside a word is none of a comment.
        if quoted and (text[at] != "#" or text[at - 1].isspace()):
            at = quoted.end()
            continue
        if text[at] == "{":
            depth += 1
        elif text[at] == "}":
            depth -= 1
            if depth == 0:
                return at + 1
        at += 1
    raise KflexError("a menu entry of grub's configuration has no end", text[opening - 60 : opening])


def _entries(text: str, start: int, end: int, parents: tuple[Entry, ...]) -> Iterator[Entry]:
    at = start
    while (match := _HEAD.search(text, at, end)) is not None:
        line_end = text.find("\n", match.start(1))
        line_end = end if line_end < 0 else line_end
        header = text[match.start() : line_end].strip()
        if not header.endswith("{"):
            at = line_end
            continue
        try:
            words = shlex.split(header[:-1])
        except ValueError:
            at = line_end
            continue
        close = _block_end(text, match.start() + text[match.start() : line_end].rindex("{"))
        title, name = words[1] if len(words) > 1 else "", ""
        for option, value in itertools.pairwise(words):
            if option in ("--id", "$menuentry_id_option", "${menuentry_id_option}"):
                name = value
        last = text.find("\n", close)
        last = len(text) if last < 0 else last + 1
        body = text[line_end:close]
        is_submenu = match.group(1) == "submenu"
        line = "" if is_submenu else _linux(body)
        bare = Entry(title, name or title, "", "", match.start(), last, parents, (), is_submenu)
        children = tuple(_entries(text, line_end, close, (*parents, bare))) if is_submenu else ()
        image, _, rest = line.partition(" ")
        yield Entry(
            title,
            name or title,
            PurePosixPath(image).name,
            rest.strip(),
            match.start(),
            last,
            parents,
            children,
            is_submenu,
        )
        at = last


def _linux(body: str) -> str:
    match = re.search(r"^\s*linux(?:efi|16)?\s+(.*)$", body, re.M)
    return re.sub(r"\s+", " ", match.group(1)).strip() if match else ""


def menu(text: str) -> tuple[Entry, ...]:
    """The menu's top level. KflexError where a block does not end."""
    return tuple(_entries(text, 0, len(text), ()))


def flat(entries: tuple[Entry, ...]) -> Iterator[Entry]:
    """All entries that boot something, in the menu's order."""
    for entry in entries:
        if entry.is_submenu:
            yield from flat(entry.children)
        else:
            yield entry


def find(text: str, image: str) -> Entry | None:
    """The entry to choose for a kernel image's file: not a recovery one, and one that names its release."""
    release = image.partition("-")[2]
    found = [entry for entry in flat(menu(text)) if entry.image == image and not entry.is_recovery]
    # The top one ("simple") is whichever kernel is the newest when the menu is next made.
    return min(found, key=lambda entry: release not in entry.id, default=None)


def default(text: str, variables: dict[str, str]) -> str:
    """What the configuration boots when nobody chooses, as a selector; saved_entry is looked up."""
    values = [match.group(1).strip("\"'") for match in _DEFAULT.finditer(text)]
    value = next((value for value in reversed(values) if "next_entry" not in value), "0")
    if value in ("${saved_entry}", "$saved_entry"):
        value = variables.get("saved_entry", "") or "0"
    return value


def resolve(text: str, selector: str) -> Entry | None:
    """The entry that a selector (``2``, ``1>0``, ids, titles) boots; grub takes the first for a wrong one."""
    level = menu(text)
    found: Entry | None = None
    for part in re.split(r"(?<!>)>(?!>)", selector):
        part = part.replace(">>", ">")
        named = [entry for entry in level if part in (entry.id, entry.title)]
        if not named and part.isdigit() and int(part) < len(level):
            named = [level[int(part)]]
        if not named:
            break
        found = named[0]
        level = found.children
    found = found or next(iter(menu(text)), None)
    while found is not None and found.is_submenu:
        found = next(iter(found.children), None)
    return found


def prune(text: str, image: str) -> str:
    """The configuration without a kernel's entries, fit to boot from: where one of them was the first of the
    menu, the next kernel's takes its place."""
    top = menu(text)
    dead = [entry for entry in flat(top) if entry.image == image]
    left = [entry for entry in flat(top) if entry.image and entry.image != image]
    cuts = {entry.start: (entry.end, "") for entry in dead}
    for entry in top:
        inside = list(flat((entry,)))
        if entry.is_submenu and inside and all(item in dead for item in inside):
            cuts = {start: cut for start, cut in cuts.items() if not entry.start <= start < entry.end}
            cuts[entry.start] = (entry.end, "")
    if top and top[0] in dead and left:
        cuts[top[0].start] = (top[0].end, text[left[0].start : left[0].end])
    made, at = [], 0
    for start in sorted(cuts):
        made += [text[at:start], cuts[start][1]]
        at = cuts[start][0]
    return "".join([*made, text[at:]])


def takes_next_entry(text: str) -> bool:
    """Whether the configuration honours next_entry and takes it back before it boots."""
    return all(
        re.search(pattern, text, re.M)
        for pattern in (
            r"^\s*load_env\b",
            r"default=\"?\$\{?next_entry\b",
            r"^\s*save_env\s+(?:\S+\s+)*next_entry\b",
        )
    )


# -- the block of variables


def variables(root: Root, path: str) -> dict[str, str]:
    """grub's variables; none where there is no block."""
    found: dict[str, str] = {}
    for line in root.text(path).splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found[name] = re.sub(r"\\(.)", r"\1", value)
    return found


def editenv(root: Root) -> tuple[str, bool]:
    """(the program, whether it is this machine's): grub-editenv touches only the file that it is given."""
    host = shutil.which("grub-editenv") or shutil.which("grub2-editenv")
    if host is not None:
        return host, True
    own = root.program("grub-editenv", "grub2-editenv") if root.runs else None
    if own is None:
        raise Unavailable(
            "grub-editenv is not there", "", "install grub-common (Fedora: grub2-tools-minimal)"
        )
    return own, False


def set_variable(root: Root, path: str, name: str, value: str | None) -> None:
    """Set one of grub's variables, or drop it. KflexError where the block is not one."""
    program, of_host = editenv(root)
    place: Path = root.real(path)
    if place.exists() and place.stat().st_size != _ENVIRONMENT_SIZE:
        raise KflexError(
            "grub's variables are damaged: not 1024 bytes",
            str(place),
            f"`{program} {place} create` makes them anew",
        )
    shown = str(place) if of_host else path
    change = ["set", f"{name}={value}"] if value is not None else ["unset", name]
    for arguments in ([] if place.exists() else [["create"]]) + [change]:
        if not of_host:
            root.run([program, shown, *arguments])
            continue
        done = subprocess.run(
            [program, shown, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise KflexError(f"{Path(program).name} failed, {done.stderr.strip()}", shown)
