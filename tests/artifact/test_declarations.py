"""Which heap declarations a tree has: what a compiler sees, not what the text looks like."""

from __future__ import annotations

from pathlib import Path

import pytest

from kflex_repro.errors import KflexError
from kflex_repro.heap import declarations
from kflex_repro.heap.declarations import Found, Shape
from tests.artifact.variants import HEADER

SHAPE = Shape()


def _tree(root: Path, text: str, more: dict[str, str] | None = None) -> Found:
    files = {
        "bpf/include/ffkx_heap.bpf.h": HEADER.replace("@SIZE@", "size"),
        "bpf/one.bpf.c": "#include <ffkx_heap.bpf.h>\n" + text,
        **(more or {}),
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return declarations.find(root, SHAPE)


def test_a_declaration_is_found_with_its_place_name_and_compiled_size(tmp_path: Path) -> None:
    (one,) = _tree(tmp_path, '\nffkx_heap(256, 0) heap SEC(".maps");\n').declarations
    assert (one.path, one.line, one.text, one.names) == ("bpf/one.bpf.c", 3, "256", ("heap",))
    assert (one.gb, one.pages, one.value, one.label) == (256, 256 * 262144, 256, "one.heap")


def test_a_shift_is_no_size_in_a_macro_without_parentheses(tmp_path: Path) -> None:
    (one,) = _tree(tmp_path, "ffkx_heap(1 << 8, 0) heap;").declarations
    assert (one.value, one.gb) == (256, None)


def test_a_size_from_another_macro_says_which(tmp_path: Path) -> None:
    (one,) = _tree(tmp_path, "#define HEAP_GB 64\nffkx_heap(HEAP_GB, 0) heap;").declarations
    assert (one.text, one.gb, one.macros) == ("HEAP_GB", 64, ("HEAP_GB",))


def test_several_declarators_are_several_heaps(tmp_path: Path) -> None:
    (one,) = _tree(tmp_path, 'ffkx_heap(4, 0) a SEC(".maps"), b SEC(".maps");').declarations
    assert one.names == ("a", "b")


def test_what_is_left_alone_is_said(tmp_path: Path) -> None:
    found = _tree(tmp_path, "ffkx_heap(4, 0) a;\n/* ffkx_heap(1, 0) */\n#if 0\nffkx_heap(2, 0) b;\n#endif\n")
    assert [(m.line, m.why) for m in found.mentions] == [
        (3, "in a comment"),
        (5, "in code that is not compiled"),
    ]


def test_a_heap_in_a_header_is_one_declaration_of_both_objects(tmp_path: Path) -> None:
    shared = {
        "bpf/shared.h": "ffkx_heap(32, 0) heap;\n",
        "bpf/two.bpf.c": '#include <ffkx_heap.bpf.h>\n#include "../bpf/shared.h"\n',
    }
    (one,) = _tree(tmp_path, '#include "shared.h"\n', shared).declarations
    assert (one.path, one.objects) == ("bpf/shared.h", ("bpf/one.bpf.c", "bpf/two.bpf.c"))
    assert one.gb == 32


def test_the_size_is_found_through_a_macro_that_passes_it_on(tmp_path: Path) -> None:
    wrapper = "#define NAMED(name, gb) ffkx_heap((gb), 0) name\nNAMED(heap, 16);\n"
    (one,) = _tree(tmp_path, wrapper).declarations
    assert (one.text, one.gb) == ("16", 16)


@pytest.mark.parametrize("define", ["HIDDEN() ffkx_heap(16, 0)", "HIDDEN(n) ffkx_heap(n * 2, 0)"])
def test_a_macro_that_hides_the_size_is_refused_with_its_place(tmp_path: Path, define: str) -> None:
    use = "HIDDEN(8)" if "(n)" in define else "HIDDEN()"
    with pytest.raises(KflexError, match=r"HIDDEN.*bpf/one\.bpf\.c:3"):
        _tree(tmp_path, f"#define {define}\n{use} heap;\n")


def test_a_tree_without_declarations_has_none(tmp_path: Path) -> None:
    assert declarations.find(tmp_path, SHAPE) == Found((), ())
