"""grub's menu read, resolved and pruned; its variables."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kflex_repro.errors import KflexError
from kflex_repro.kernel import grub
from kflex_repro.kernel.place import Root
from tests.conftest import unavailable
from tests.unit.kernel_trees import NEW, OLD, grub_config, write

SUBMENU = "gnulinux-advanced-UUID"


def test_the_menu_is_read_with_its_submenus() -> None:
    text = grub_config([NEW, OLD], "/boot")
    top = grub.menu(text)
    assert [item.id for item in top] == ["gnulinux-simple-UUID", SUBMENU, "uefi-firmware"]
    assert [item.image for item in top[1].children] == [f"vmlinuz-{NEW}"] * 2 + [f"vmlinuz-{OLD}"] * 2
    assert [item.is_recovery for item in top[1].children] == [False, True] * 2
    assert text[top[2].start : top[2].end].startswith("menuentry 'UEFI")


def test_a_kernel_is_chosen_by_its_own_entry_not_by_the_one_for_the_newest() -> None:
    found = grub.find(grub_config([NEW, OLD]), f"vmlinuz-{NEW}")
    assert found and found.selector == f"{SUBMENU}>gnulinux-{NEW}-advanced-UUID"
    assert grub.find(grub_config([OLD]), f"vmlinuz-{NEW}") is None


@pytest.mark.parametrize(
    ("selector", "release"),
    [
        ("0", NEW),
        ("1>2", OLD),
        ("1", NEW),
        (f"{SUBMENU}>gnulinux-{OLD}-advanced-UUID", OLD),
        (f"Advanced options for Debian GNU/Linux>Debian GNU/Linux, with Linux {OLD}", OLD),
        ("nothing like it", NEW),
        ("77", NEW),
    ],
)
def test_what_a_default_boots(selector: str, release: str) -> None:
    entry = grub.resolve(grub_config([NEW, OLD]), selector)
    assert entry and entry.image == f"vmlinuz-{release}"


def test_a_saved_default_is_looked_up() -> None:
    text = grub_config([NEW, OLD], default="${saved_entry}")
    assert grub.default(text, {"saved_entry": "1>2"}) == "1>2"
    assert grub.default(text, {}) == "0"
    assert grub.default(grub_config([OLD], default="2"), {"saved_entry": "1"}) == "2"


def test_a_pruned_menu_boots_the_next_kernel_first() -> None:
    text = grub.prune(grub_config([NEW, OLD]), f"vmlinuz-{NEW}")
    assert NEW not in text
    assert [item.image for item in grub.flat(grub.menu(text))] == [f"vmlinuz-{OLD}"] * 3 + [""]
    first = grub.resolve(text, "0")
    assert first and first.image == f"vmlinuz-{OLD}" and not first.parents
    assert grub.prune(text, f"vmlinuz-{NEW}") == text
    # The other one is not the first, and nothing comes in its place.
    older = grub.prune(grub_config([NEW, OLD]), f"vmlinuz-{OLD}")
    assert [item.image for item in grub.flat(grub.menu(older))] == [f"vmlinuz-{NEW}"] * 3 + [""]


def test_a_submenu_that_is_emptied_goes() -> None:
    text = (
        "menuentry 'a' {\n linux /vmlinuz-1\n}\nsubmenu 's' {\n menuentry 'b' {\n  linux /vmlinuz-2\n }\n}\n"
    )
    assert grub.prune(text, "vmlinuz-2") == "menuentry 'a' {\n linux /vmlinuz-1\n}\n"


def test_a_menu_without_an_end_is_one_line() -> None:
    with pytest.raises(KflexError, match="has no end"):
        grub.menu("menuentry 'a' {\n linux /vmlinuz-1\n")


def test_whether_a_choice_for_once_is_taken_back() -> None:
    assert grub.takes_next_entry(grub_config([OLD]))
    assert not grub.takes_next_entry(grub_config([OLD], once=False))
    assert not grub.takes_next_entry(grub_config([OLD]).replace("   save_env next_entry\n", ""))


def test_variables_are_written_by_grubs_own_program(tmp_path: Path) -> None:
    if not (shutil.which("grub-editenv") or shutil.which("grub2-editenv")):
        unavailable("grub-editenv is not there: package grub-common")
    root, path = Root(tmp_path), "/boot/grub/grubenv"
    (tmp_path / "boot/grub").mkdir(parents=True)
    grub.set_variable(root, path, "next_entry", "a>b c")
    grub.set_variable(root, path, "saved_entry", "0")
    assert grub.variables(root, path) == {"next_entry": "a>b c", "saved_entry": "0"}
    assert (tmp_path / "boot/grub/grubenv").stat().st_size == 1024
    grub.set_variable(root, path, "next_entry", None)
    assert grub.variables(root, path) == {"saved_entry": "0"}
    write(tmp_path / "boot/grub/grubenv", "short")
    with pytest.raises(KflexError, match="not 1024 bytes"):
        grub.set_variable(root, path, "next_entry", "1")
