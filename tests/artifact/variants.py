"""Heap declarations written in every way we could think of, with what a fit must make of each."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

HEADER = """\
#ifndef SYNTHETIC_HEAP_H
#define SYNTHETIC_HEAP_H
#include <vmlinux.h>
#include <bpf_helpers.h>
void register_heap(void *map) __ksym;
#define ffkx_heap(size, flags)                     \\
  struct {                                         \\
    __uint(type, BPF_MAP_TYPE_HEAP);               \\
    __uint(key_size, 4);                           \\
    __uint(value_size, 4096);                      \\
    __uint(max_entries, @SIZE@ * 262144);          \\
    __uint(map_flags, BPF_F_MMAPABLE | flags);     \\
  }
#endif
"""
# Defined at the head of every variant.
_MACROS = "#define HEAP_GB 256\n#define SMALL_GB (0x4u)\n#define TWICE(n) ((n) * 2)\n"


@dataclass(frozen=True)
class Size:
    """A size argument: its text, and the GB it compiles to where the macro has it in parentheses, or bare."""

    text: str
    wrapped: int | None
    bare: int | None


@dataclass(frozen=True)
class Part:
    """Text with the sizes it declares: ``{}`` stands for each in turn."""

    text: str
    sizes: tuple[Size, ...] = ()


@dataclass(frozen=True)
class Variant:
    """A BPF source file, its header, and what they are after a fit."""

    header: bytes
    parts: tuple[Part, ...]
    wrapped: bool
    newline: str
    mark: bool

    def source(self, gb: int | None = None) -> bytes:
        """The file as it is, or as it must be after a fit to ``gb``."""
        text = _MACROS
        for part in self.parts:
            text += part.text.format(*(self._size(size, gb) for size in part.sizes))
        text = text.replace("\n", self.newline)
        # Latin-1 makes bytes that are no UTF-8 of the accents in comments.
        return (b"\xef\xbb\xbf" if self.mark else b"") + text.encode("latin-1")

    @property
    def sizes(self) -> list[tuple[str, int | None]]:
        """Each declaration's size: its text, and the GB it compiles to."""
        return [(size.text, self._compiled(size)) for part in self.parts for size in part.sizes]

    def _compiled(self, size: Size) -> int | None:
        return size.wrapped if self.wrapped else size.bare

    def _size(self, size: Size, gb: int | None) -> str:
        return size.text if gb is None or gb == self._compiled(size) else str(gb)


def _plain(text: str, value: int) -> Size:
    return Size(text, value, value)


_powers = st.integers(0, 10).map(lambda bits: 1 << bits)
sizes = st.one_of(
    _powers.map(lambda n: _plain(str(n), n)),
    st.tuples(_powers, st.sampled_from(["u", "UL", "ull", "LL"])).map(
        lambda t: _plain(f"{t[0]}{t[1]}", t[0])
    ),
    _powers.map(lambda n: _plain(hex(n), n)),
    _powers.map(lambda n: _plain(f"0{n:o}", n)),
    _powers.map(lambda n: _plain(f"(({n}))", n)),
    # A shift is weaker than the macro's multiplication: bare, it is no size at all.
    st.integers(1, 10).map(lambda bits: Size(f"1 << {bits}", 1 << bits, None)),
    st.integers(1, 10).map(lambda bits: _plain(f"(1 << {bits})", 1 << bits)),
    _powers.map(lambda n: _plain(f"{n} * 2", n * 2)),
    _powers.map(lambda n: Size(f"{n} + {n}", n * 2, None)),
    st.sampled_from([_plain("HEAP_GB", 256), _plain("SMALL_GB", 4), _plain("TWICE(2)", 4)]),
    _powers.map(lambda n: _plain(f"{n} /* one */ * 1", n)),
    _powers.map(lambda n: _plain(f"{n} *\\\n 1", n)),
)

_space = st.sampled_from(["", " ", "\t", "\n", " /* GB */ ", " \\\n  ", "// one\n  "])
_flags = st.sampled_from(["0", "(1U << 19)", "FLAG_A | FLAG_B", "both(1, 2)"])
_before = st.sampled_from(["", "static ", "/* é */ ", "__hidden\n"])
_after = st.sampled_from([' SEC(".maps")', '\nSEC(".maps")', ' __attribute__((section(".maps"), used))', ""])


@st.composite
def _declaration(draw: st.DrawFn) -> Part:
    size = draw(sizes)
    gaps = [draw(_space) for _ in range(4)]
    head, tail = draw(_before), draw(_after)
    more = draw(st.sampled_from(["", f", also{tail}"]))
    flags = draw(_flags)
    text = f"{head}ffkx_heap({gaps[0]}{{}}{gaps[1]},{gaps[2]}{flags}{gaps[3]}) heap{tail}{more};\n"
    return Part(text, (size,))


@st.composite
def _two_on_a_line(draw: st.DrawFn) -> Part:
    return Part(
        'ffkx_heap({},0) a SEC(".maps"); ffkx_heap({}, 0) b SEC(".maps");\n', (draw(sizes), draw(sizes))
    )


@st.composite
def _in_a_branch(draw: st.DrawFn) -> Part:
    text = (
        '#ifdef NEVER\nffkx_heap(7, 0) off SEC(".maps");\n#else\nffkx_heap({}, 0) on SEC(".maps");\n#endif\n'
    )
    return Part(text, (draw(sizes),))


@st.composite
def _redefined(draw: st.DrawFn) -> Part:
    text = '#define HERE 8\nffkx_heap({}, 0) heap SEC(".maps");\n#undef HERE\n'
    return Part(text, (draw(st.one_of(sizes, st.just(_plain("HERE", 8)))),))


_decoys = st.sampled_from(
    [
        "// ffkx_heap(3, 0) heap;\n",
        "// continued \\\nffkx_heap(3, 0) heap;\n",
        '/*\n// été\nffkx_heap(16, 0) heap SEC(".maps");\n*/\n',
        'const char *text = "ffkx_heap(3, 0) heap;";\n',
        'const char *split = "ffkx_heap(3, \\\n0)";\n',
        "int my_ffkx_heap(int, int);\nint x = my_ffkx_heap(3, 0);\n",
        "int ffkx_heap_size(int n);\nint FFKX_HEAP(int n);\n",
        '#if 0\nffkx_heap(3, 0) heap SEC(".maps");\n#endif\n',
        "#define UNUSED_HEAP(n) ffkx_heap(n, 0)\n",
        '#define NOTE "ffkx_heap(3, 0)"\n',
        "#error ffkx_heap(3, 0)\n",
        "struct pad {{ int ffkx_heap; }};\n",
        "int (*ffkx_heap)(int);\n",
        "private(A) struct bpf_spin_lock lock;\n",
        'SEC("tc")\nint program(struct __sk_buff *ctx) {{\n  auto map = &heap;\n  return map->base;\n}}\n',
        "struct hashmap __hptr *table;\n",
        "#include <missing.bpf.h>\n",
        "}}\n",
        "\x0c\n",
    ]
).map(Part)

_tails = st.sampled_from([Part(""), Part("/* the end, no newline"), Part("int last")])


@st.composite
def variants(draw: st.DrawFn) -> Variant:
    """Files of one to six parts, at least one of which declares a heap."""
    wrapped = draw(st.booleans())
    real = st.one_of(_declaration(), _declaration(), _two_on_a_line(), _in_a_branch(), _redefined())
    parts = [Part("#include <ffkx_heap.bpf.h>\n"), *draw(st.lists(st.one_of(real, _decoys), max_size=5))]
    parts.insert(draw(st.integers(1, len(parts))), draw(real))
    parts.append(draw(_tails))
    header = HEADER.replace("@SIZE@", "(size)" if wrapped else "size").encode()
    return Variant(header, tuple(parts), wrapped, draw(st.sampled_from(["\n", "\r\n"])), draw(st.booleans()))
