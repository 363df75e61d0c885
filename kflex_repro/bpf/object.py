"""Compiled BPF objects: open, adjust, load."""

from __future__ import annotations

import ctypes as c
import os
import re
from collections.abc import Mapping
from pathlib import Path

from kflex_repro.bpf import btf, libbpf
from kflex_repro.bpf.links import Program
from kflex_repro.bpf.maps import Map
from kflex_repro.errors import KflexError, errno_text, os_failure

# libbpf names internal maps by (a part of) the object's name and the section: callers know the section.
_INTERNAL = re.compile(r"\.(rodata|data|bss|kconfig)(\..*)?$")
_LOG = re.compile(
    r"prog '(?P<name>[^']+)': -- BEGIN PROG LOAD LOG --\n(?P<log>.*?)-- END PROG LOAD LOG --", re.S
)
# Lines of a verifier log that say no verdict: statistics, instructions, register states, source lines.
_STATISTICS = re.compile(r"(processed \d+ insns|verification time|stack depth|max_states|combined stack)")
_TRACE = re.compile(
    r"(\d+: |; |R\d+(_\w+)?=|from \d+ to \d+|arg#|func#|\(|last_idx|regs=|parent |mark_precise|$)"
)


class VerifierError(KflexError):
    """The kernel refused ``program``; ``log`` is the full verifier log, ``reason`` its verdict."""

    def __init__(self, program: str, reason: str, log: str, where: str, code: int) -> None:
        super().__init__(
            f"the kernel refused program {program}: {reason}",
            where,
            "" if log else "run as root" if code == 1 else "",
        )
        self.program, self.reason, self.log, self.errno = program, reason, log, code


def verdict(log: str) -> str:
    """What a verifier log says was wrong: the (one or two) lines before the statistics."""
    lines = [line.strip() for line in log.splitlines()]
    found: list[str] = []
    for line in reversed([line for line in lines if line and not _STATISTICS.match(line)]):
        if _TRACE.match(line) or len(found) == 2:
            break
        found.insert(0, line)
    return "; ".join(found) or "no reason given"


class Object:
    """An opened BPF object file.

    ``Object.open(path)``; set rodata, sizes, autoload; ``load()``. ``close()`` (or leaving the context) gives
    up its descriptors: what is neither pinned nor attached by a link then leaves the kernel.
    """

    def __init__(self, pointer: int, path: Path) -> None:
        self._pointer: int | None = pointer
        self.path = path
        self._loaded = False
        self._btf: btf.Btf | None = None
        self.maps: Mapping[str, Map] = self._find_maps()
        self.programs: Mapping[str, Program] = self._find_programs()

    @classmethod
    def open(cls, path: Path) -> Object:
        """Read an object file; nothing is in the kernel yet."""
        path = Path(path)
        if not path.is_file():
            raise KflexError("no such BPF object", str(path), "run `kflex-repro build`")
        with libbpf.captured() as lines:
            pointer = libbpf.library().bpf_object__open_file(os.fsencode(path), None)
            code = c.get_errno()
        if not pointer:
            raise KflexError(
                f"not a usable BPF object, {_libbpf_reason(lines) or errno_text(code)}",
                str(path),
                "run `kflex-repro build --force`",
            )
        return cls(pointer, path)

    def _find_maps(self) -> dict[str, Map]:
        lib, found = libbpf.library(), {}
        pointer = lib.bpf_object__next_map(self._pointer, None)
        while pointer:
            name: str = lib.bpf_map__name(pointer).decode()
            if lib.bpf_map__is_internal(pointer) and (match := _INTERNAL.search(name)):
                name = match.group(0)
            found[name] = Map(pointer=pointer, name=name)
            pointer = lib.bpf_object__next_map(self._pointer, pointer)
        return found

    def _find_programs(self) -> dict[str, Program]:
        lib, found = libbpf.library(), {}
        pointer = lib.bpf_object__next_program(self._pointer, None)
        while pointer:
            name: str = lib.bpf_program__name(pointer).decode()
            found[name] = Program(pointer=pointer, name=name)
            pointer = lib.bpf_object__next_program(self._pointer, pointer)
        return found

    def _alive(self) -> int:
        if self._pointer is None:
            raise KflexError("the BPF object is closed", str(self.path))
        return self._pointer

    @property
    def btf(self) -> btf.Btf:
        """The object's types, as libbpf completed them (section offsets filled in)."""
        if self._btf is None:
            lib = libbpf.library()
            pointer = lib.bpf_object__btf(self._alive())
            if not pointer:
                raise KflexError("the object has no BTF", str(self.path), "compile it with -g")
            size = c.c_uint32()
            data = libbpf.check_pointer(lib.btf__raw_data(pointer, c.byref(size)), "btf__raw_data")
            self._btf = btf.Btf(c.string_at(data, size.value), str(self.path))
        return self._btf

    def set_rodata(self, **values: int | bool) -> None:
        """Set ``const volatile`` globals by name, before load (the verifier then sees constants).

        KflexError for an unknown name, a value that does not fit, or after load.
        """
        self._set_globals(".rodata", values)

    def set_data(self, **values: int | bool) -> None:
        """Set initial values of initialised (``.data``) globals by name, before load."""
        self._set_globals(".data", values)

    def _set_globals(self, section: str, values: Mapping[str, int | bool]) -> None:
        if self._loaded:
            raise KflexError(f"{section} is fixed once the object is loaded", str(self.path))
        size = c.c_size_t()
        target = self.maps.get(section)
        start = libbpf.library().bpf_map__initial_value(target._pointer, c.byref(size)) if target else None
        if not start:
            raise KflexError(f"the object has no {section}", str(self.path))
        variables = self.btf.variables(section)
        for name, value in values.items():
            if name not in variables:
                raise KflexError(f"no variable {name} in {section}", str(self.path))
            variable = variables[name]
            try:
                data = int(value).to_bytes(variable.size, "little", signed=variable.signed)
            except OverflowError:
                raise KflexError(
                    f"{value} does not fit into {name} ({variable.size} bytes)", str(self.path)
                ) from None
            assert variable.offset + variable.size <= size.value
            c.memmove(start + variable.offset, data, variable.size)

    def load(self) -> None:
        """Create the maps and load the programs.

        VerifierError where a program is refused, KflexError for anything else; nothing stays then.
        """
        with libbpf.captured() as lines:
            result = libbpf.library().bpf_object__load(self._alive())
        if result >= 0:
            self._loaded = True
            return
        text, code = "".join(lines), -result
        if match := _LOG.search(text):
            log = match.group("log")
            raise VerifierError(match.group("name"), verdict(log), log, str(self.path), code)
        reason = _libbpf_reason(lines)
        if match := re.search(r"prog '([^']+)': BPF program load failed", text):
            raise VerifierError(match.group(1), errno_text(code), "", str(self.path), code)
        raise os_failure(
            "loading the BPF object", code, f"{self.path}; {reason}" if reason else str(self.path)
        )

    def close(self) -> None:
        """Give up the object and its descriptors; no error twice."""
        pointer, self._pointer = self._pointer, None
        if pointer is None:
            return
        for known in self.maps.values():
            known.close()
        for program in self.programs.values():
            program.close()
        libbpf.library().bpf_object__close(pointer)

    def __enter__(self) -> Object:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _libbpf_reason(lines: list[str]) -> str:
    """What libbpf said first: later lines are its callers repeating that something failed."""
    for line in lines:
        text = line.removeprefix("libbpf: ").strip()
        if text and "Retrying without BTF" not in text:
            return text
    return ""
