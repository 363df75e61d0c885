"""Names for addresses: of the kernel and its BPF programs, and of the files that a process has mapped."""

from __future__ import annotations

import bisect
import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

from kflex_repro.errors import KflexError
from kflex_repro.probe import elf, stacks

_KALLSYMS = Path("/proc/kallsyms")
_LINE = re.compile(r"([0-9a-f]+) [tTwW] (\S+)(?:\t\[(\w+)\])?")
_BPF = re.compile(r"^bpf_prog_[0-9a-f]{16}_?(.*)$")


class Kernel:
    """The kernel's functions, as /proc/kallsyms has them when this is made."""

    def __init__(self) -> None:
        found: list[tuple[int, str]] = []
        try:
            lines = _KALLSYMS.read_text().splitlines()
        except OSError:
            lines = []
        for line in lines:
            if match := _LINE.match(line):
                found.append((int(match.group(1), 16), match.group(2)))
        # Hidden (kptr_restrict), all of them are 0.
        found = sorted(one for one in found if one[0])
        self._addresses = [address for address, _ in found]
        self._names = [name for _, name in found]

    @property
    def known(self) -> bool:
        """Whether the kernel shows its addresses to us."""
        return bool(self._addresses)

    def frame(self, address: int) -> str:
        """The frame for an address, marked as stacks.py says."""
        at = bisect.bisect_right(self._addresses, address) - 1
        if at < 0:
            return "[kernel]" + stacks.KERNEL
        name = self._names[at]
        if match := _BPF.match(name):
            return stacks.clean(match.group(1) or name) + stacks.BPF
        return stacks.clean(name) + stacks.KERNEL


@dataclass(frozen=True)
class _Mapping:
    start: int
    end: int
    offset: int
    path: str


class User:
    """The functions of one process, by what it has mapped as code when this is made."""

    def __init__(self, pid: int) -> None:
        self._root = Path(f"/proc/{pid}/root")
        self._files: dict[str, elf.Binary | None] = {}
        self._maps: list[_Mapping] = []
        try:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        except OSError:
            lines = []
        for fields in (line.split(None, 5) for line in lines):
            if "x" in fields[1]:
                start, end = (int(part, 16) for part in fields[0].split("-"))
                path = fields[5] if len(fields) == 6 else ""
                self._maps.append(_Mapping(start, end, int(fields[2], 16), path))
        self._starts = [one.start for one in self._maps]

    def frame(self, address: int) -> str | None:
        """The frame for an address; None if no code is mapped there."""
        at = bisect.bisect_right(self._starts, address) - 1
        if at < 0 or address >= self._maps[at].end:
            return None
        found = self._maps[at]
        name = None
        if binary := self._binary(found.path):
            name = binary.at(address - found.start + found.offset)
        if name is not None:
            return stacks.clean(name.name)
        return f"[{stacks.clean(Path(found.path).name.strip('[]') or 'anon')}]"

    def _binary(self, path: str) -> elf.Binary | None:
        if path not in self._files:
            self._files[path] = None
            if path.startswith("/"):
                # Deleted or replaced since: its frames have the file's name only.
                with contextlib.suppress(KflexError):
                    self._files[path] = elf.read(self._root / path[1:], self._root)
        return self._files[path]
