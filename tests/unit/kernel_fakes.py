"""A kernel tree in small: Kconfig files that kconfiglib configures, objects that the C compiler makes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_KCONFIG = """\
mainmenu "A kernel in small"

config MODULES
	bool "Modules"
	option modules

config 64BIT
	bool "64 bits"

config NET
	bool "Network"
	select CHECKSUM

config CHECKSUM
	bool

config FUSE_FS
	tristate "Files in user space"

config VIRTIO_FS
	tristate "Files of the host"
	depends on FUSE_FS

config CPUS
	int "CPUs"
	range 2 8
	default 2

config NAME
	string "Name"
	default "small"

choice
	prompt "Preemption"
	default VOLUNTARY

config VOLUNTARY
	bool "Voluntary"

config FULL
	bool "Full"

endchoice

source "lib/Kconfig"
"""
_LIB_KCONFIG = """\
config TOOL_VERSION
	int
	default 116

config EXPERT
	bool "Odd things"

config HIDDEN
	bool "Only for experts" if EXPERT

config DEBUG_INFO_BTF
	bool "Types of the kernel"

config BTF
	bool "Types"
	depends on (NET || 64BIT) && TOOL_VERSION >= 121
"""
# As the real one's: what is quoted is a line of the log.
_MAKEFILE = """\
VERSION = 6
PATCHLEVEL = 99
SUBLEVEL = 1
EXTRAVERSION = -small
export srctree := $(CURDIR)
export KCONFIG_CONFIG := $(O)/.config
OBJECTS := $(addprefix $(O)/,one.o two.o three.o)
%config:
	cd $(srctree) && $(PYTHON) -m $(subst tiny,allno,$@) Kconfig
$(O)/%.o: %.c $(O)/.config
	@echo "  CC      $*.o"
	@if [ "$*" = three ] && [ -p "$(GATE)" ]; then read word < "$(GATE)"; fi
	@$(CC) -c -o $@ $<
bzImage: $(OBJECTS)
	@mkdir -p $(O)/arch/x86/boot $(O)/include/config
	@$(LD) -r -o $(O)/arch/x86/boot/bzImage $(OBJECTS)
	@nm $(O)/arch/x86/boot/bzImage > $(O)/System.map
	@echo 6.99.1-small > $(O)/include/config/kernel.release
	@objcopy --add-section .BTF=$(O)/System.map $(O)/arch/x86/boot/bzImage $(O)/vmlinux
modules:
modules_install:
	@mkdir -p $(INSTALL_MOD_PATH)/lib/modules/6.99.1-small
	@echo > $(INSTALL_MOD_PATH)/lib/modules/6.99.1-small/modules.dep
"""
_SHIM = "#!/bin/sh\necho '{name} 2.6.4'\n"
SHIMS = ("flex", "bison", "bc", "pahole")


def tree(top: Path) -> Path:
    """Make the tree. What an object is compiled from is top/NAME.c."""
    for directory in ("scripts/kconfig", "lib"):
        (top / directory).mkdir(parents=True)
    (top / "Kconfig").write_text(_KCONFIG)
    (top / "lib" / "Kconfig").write_text(_LIB_KCONFIG)
    (top / "Kbuild").touch()
    (top / "Makefile").write_text(f"PYTHON := {sys.executable}\n{_MAKEFILE}")
    for name in ("one", "two", "three"):
        (top / f"{name}.c").write_text(f"int {name};\n")
    return top


def tools(directory: Path) -> str:
    """A PATH on which everything that a kernel is built with is found: what the small one does not run is
    there in name only."""
    directory.mkdir()
    for name in SHIMS:
        (directory / name).write_text(_SHIM.format(name=name))
        (directory / name).chmod(0o755)
    return f"{directory}:{os.environ['PATH']}"


def fragment(path: Path, *lines: str) -> Path:
    """A fragment of these lines."""
    path.write_text("".join(f"{line}\n" for line in lines))
    return path
