"""Kernel configurations: merged by Kconfig; an option that did not stick is named with its reason."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from kflex_repro.build import kernel_build, kernel_config, kernel_needs, kernel_source, toolchain
from kflex_repro.build.kernel_config import Asked, Config
from kflex_repro.build.kernel_source import Tree
from kflex_repro.errors import KflexError
from tests.conftest import unavailable
from tests.unit import kernel_fakes
from tests.unit.kernel_fakes import fragment

X86 = kernel_source.arch("x86_64")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KFLEX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small(tmp_path: Path, own_cache: Path) -> Tree:
    return kernel_source.directory(kernel_fakes.tree(tmp_path / "small"))


def configure(tree: Tree, *fragments: Path, base: tuple[str, str] | None = None) -> Config:
    return kernel_config.make(tree, X86, fragments, base, ["tools"], toolchain.Runner())


def reasons(config: Config) -> dict[str, str]:
    return {one.asked.name: one.why for one in config.dropped}


def test_fragments_are_merged_and_the_later_one_wins(small: Tree, tmp_path: Path) -> None:
    first = fragment(
        tmp_path / "first.config", "# why", "CONFIG_FUSE_FS=y", "CONFIG_NET=y", 'CONFIG_NAME="a b"'
    )
    second = fragment(
        tmp_path / "second.config", "CONFIG_VIRTIO_FS=y", "# CONFIG_NET is not set", "CONFIG_CPUS=4"
    )
    config = configure(small, first, second)
    assert config.dropped == ()
    wanted = {"FUSE_FS": "y", "VIRTIO_FS": "y", "NAME": '"a b"', "CPUS": "4"}
    assert {name: config.values.get(name) for name in wanted} == wanted
    assert "NET" not in config.values and config.fragments == ("first", "second")
    assert config.options == 3  # the two, and the choice's default


def test_a_dropped_option_is_named_with_its_unmet_dependency(small: Tree, tmp_path: Path) -> None:
    config = configure(small, fragment(tmp_path / "vm.config", "CONFIG_64BIT=y", "CONFIG_VIRTIO_FS=y"))
    with pytest.raises(KflexError) as caught:
        kernel_config.demand(config)
    line = str(caught.value)
    assert (
        "1 option did not stick: CONFIG_VIRTIO_FS=y (vm.config:2) is n: it needs FUSE_FS (FUSE_FS is n)"
        in line
    )
    assert "--allow-dropped" in line and "\n" not in line
    # Its dependency asked for, too, it stays.
    config = configure(small, fragment(tmp_path / "vm.config", "CONFIG_VIRTIO_FS=y", "CONFIG_FUSE_FS=y"))
    kernel_config.demand(config)


def test_each_reason_is_said(small: Tree, tmp_path: Path) -> None:
    asked = (
        *("CONFIG_NET=y", "# CONFIG_CHECKSUM is not set", "CONFIG_BTF=y", "CONFIG_CPUS=100"),
        *("CONFIG_FULL=y", "CONFIG_VOLUNTARY=y", "CONFIG_HIDDEN=y", "CONFIG_NOSUCH=y"),
    )
    found = reasons(configure(small, fragment(tmp_path / "odd.config", *asked)))
    assert found["CHECKSUM"] == "NET selects it"
    # Only the half that is unmet.
    assert found["BTF"] == "it needs TOOL_VERSION >= 121 (TOOL_VERSION is 116)"
    assert found["CPUS"] == "its range is 2 to 8"
    assert found["NOSUCH"] == "this kernel has no such option"
    assert found["HIDDEN"] == "it can be set only with EXPERT (EXPERT is n)"
    assert {"FULL", "VOLUNTARY"} & set(found) and "NET" not in found
    (choice,) = {"FULL", "VOLUNTARY"} & set(found)
    assert found[choice] == f"of its choice, {'VOLUNTARY' if choice == 'FULL' else 'FULL'} was taken"


def test_an_option_that_only_others_set_is_said_so(small: Tree, tmp_path: Path) -> None:
    found = reasons(configure(small, fragment(tmp_path / "x.config", "CONFIG_CHECKSUM=y")))
    assert found == {"CHECKSUM": "nothing but another option sets it: NET"}


def test_a_tree_that_cannot_be_read_still_has_the_option_named(small: Tree, tmp_path: Path) -> None:
    config = configure(small, fragment(tmp_path / "x.config", "CONFIG_VIRTIO_FS=y"))
    (small.root / "lib" / "Kconfig").write_text("config NEW\n\tkeyword of 2030\n")
    (why,) = kernel_config.explain(small, X86, config.text, config.dropped).values()
    assert "cannot be read" in why and "lib/Kconfig" in why


def test_the_result_is_kept_and_made_anew_for_another_question(small: Tree, tmp_path: Path) -> None:
    wish = fragment(tmp_path / "x.config", "CONFIG_NET=y")
    text = configure(small, wish).text
    (small.root / "Makefile").write_text("VERSION = 6\nPATCHLEVEL = 99\n")  # configures no more
    assert configure(small, wish).text == text
    with pytest.raises(toolchain.BuildError, match="tinyconfig"):
        configure(small, fragment(wish, "# CONFIG_NET is not set"))


def test_the_hosts_configuration_is_completed(
    small: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = "CONFIG_NET=y\nCONFIG_GONE=y\nCONFIG_CPUS=6\n"
    config = configure(small, fragment(tmp_path / "x.config", "CONFIG_CPUS=3"), base=(host, "the host's"))
    assert (config.values["NET"], config.values["CPUS"], config.base) == ("y", "3", "the host's")
    assert "GONE" not in config.values
    # Where it is: as the kernel gives it, else in /boot.
    boot = tmp_path / "boot"
    boot.mkdir()
    real = Path.read_bytes

    def read(path: Path) -> bytes:
        name = str(path)
        return real(boot / path.name) if name.startswith(("/proc/config", "/boot/config")) else real(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    with pytest.raises(KflexError, match="host's configuration is not there"):
        kernel_config.of_host()
    monkeypatch.setattr(kernel_config.platform, "release", lambda: "6.0-x")
    (boot / "config-6.0-x").write_text(host)
    assert kernel_config.of_host() == (host, "/boot/config-6.0-x")
    (boot / "config.gz").write_bytes(gzip.compress(host.upper().encode()))
    assert kernel_config.of_host() == (host.upper(), "/proc/config.gz")


@pytest.mark.parametrize(
    ("wanted", "arch", "message"),
    [
        (("nosuch",), "x86_64", "no fragment nosuch .*: there are base, bpf, net, riscv, trace, vm, x86"),
        (("./nosuch.config",), "x86_64", "no such fragment"),
        (("riscv",), "x86_64", "fragment riscv is not for x86_64"),
        (("x86",), "riscv64", "fragment x86 is not for riscv64"),
        ((), "mips", "no kernels for this architecture .mips.: --arch x86_64 or riscv64"),
    ],
)
def test_bad_fragments_and_architectures(wanted: tuple[str, ...], arch: str, message: str) -> None:
    with pytest.raises(KflexError, match=message):
        kernel_config.select(kernel_source.arch(arch), wanted, False)


def test_a_line_that_is_no_option(tmp_path: Path) -> None:
    with pytest.raises(KflexError, match=r"not an option: NET=y \(.*x.config:2\)"):
        kernel_config.read(fragment(tmp_path / "x.config", "# a comment", "NET=y"))
    assert kernel_config.read(fragment(tmp_path / "y.config", "CONFIG_NET=n")) == [
        Asked("NET", "n", "y.config:1")
    ]


def test_the_architectures_own_fragment_is_always_taken() -> None:
    def chosen(name: str, *wanted: str, host: bool = False) -> list[str]:
        return [path.stem for path in kernel_config.select(kernel_source.arch(name), wanted, host)]

    assert chosen("x86_64") == ["x86", "base", "bpf", "net", "trace", "vm"]
    assert chosen("riscv64", "base", "vm") == ["riscv", "base", "vm"]
    assert chosen("riscv64", "base", "riscv") == ["base", "riscv"]
    assert chosen("x86_64", host=True) == ["host"]
    assert chosen("x86_64", "bpf", host=True) == ["host", "bpf"]


# --- Linux 6.12's own Kconfig -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def linux() -> Tree:
    """What configures the distribution's kernel: of the download that the traced libbpf needs, too."""
    lacking = [one.name for one in kernel_needs.look(True, X86, {"DEBUG_INFO_BTF": "y"}) if one.missing]
    if lacking:
        unavailable(f"needs {', '.join(lacking)}")
    return kernel_source.distribution(toolchain.Runner())


def test_the_fragments_stick_on_linux(linux: Tree) -> None:
    config = kernel_config.make(
        linux, X86, kernel_config.select(X86, (), False), None, kernel_needs.banners(X86), toolchain.Runner()
    )
    assert config.dropped == () and len(config.asked) > 100
    wanted = (
        "DEBUG_INFO_BTF",
        "VIRTIO_FS",
        "BPF_STREAM_PARSER",
        "DYNAMIC_FTRACE_WITH_DIRECT_CALLS",
        "EXT4_FS",
    )
    assert all(config.values.get(name) == "y" for name in wanted)
    assert kernel_build.plan(linux, X86, config).key != kernel_build.plan(linux, X86, config_with(config)).key


def config_with(config: Config) -> Config:
    return Config(config.text + "CONFIG_X=y\n", config.base, config.fragments, config.asked, ())


def test_a_dropped_option_of_linux_is_explained(linux: Tree, tmp_path: Path) -> None:
    asked = (
        "CONFIG_VIRTIO_FS=y",
        "CONFIG_DEBUG_INFO_BTF=y",
        "# CONFIG_HAVE_RETHOOK is not set",
        "CONFIG_NR_CPUS=9999999",
    )
    config = configure(linux, fragment(tmp_path / "odd.config", "CONFIG_SMP=y", *asked))
    found = reasons(config)
    assert found["VIRTIO_FS"] == "it needs FUSE_FS (FUSE_FS is n)"
    assert "BPF_SYSCALL is n" in found["DEBUG_INFO_BTF"] and "PAHOLE" not in found["DEBUG_INFO_BTF"]
    assert "selects it" in found["HAVE_RETHOOK"] and "range" in found["NR_CPUS"]
    assert "SMP" not in found
