"""``run --artifact``: what the modes are, what is missing here, and a program that ends without a trace."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kflex_repro.bpf import btf, fs, kernel
from kflex_repro.build import toolchain
from kflex_repro.heap import model
from kflex_repro.run import needs, program
from kflex_repro.run.modes import MODES
from tests.artifact.building import PLAIN, TOP, append, build, copy_tree, kflex, refusal, require_tools
from tests.conftest import require


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tree that was built, with heaps of 1 GB; its cache is the environment's."""
    with pytest.MonkeyPatch.context() as patch:
        require_tools(patch)
        patch.setenv("KFLEX_CACHE", str(tmp_path_factory.mktemp("cache")))
        tree = copy_tree(tmp_path_factory.mktemp("source") / "KFlex")
        build(tree, "--program-only", "--heap-gb", "1", "--recipe", "cgroup2-path")
        yield tree


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The BTF of a kernel that knows the heap: real BTF, of an enum compiled for the purpose."""
    out = tmp_path_factory.mktemp("btf")
    source = out / "kernel.bpf.c"
    source.write_text(
        "enum bpf_map_type { BPF_MAP_TYPE_ARENA = 33, BPF_MAP_TYPE_HEAP = 34 } kind;\n"
        "int bpf_known(void) { return kind; }\n"
    )
    made = out / "kernel.o"
    command = [toolchain.clang().path, "-target", "bpf", "-g", "-O2", "-c", source, "-o", made]
    subprocess.run(command, check=True)
    return made


def report(*words: str | Path) -> dict[str, Any]:
    done = kflex("run", "--artifact", "--json", *words)
    assert done.returncode in (0, 3), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert (done.returncode == 0) == found["can_run"]
    return found


def checks(found: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["state"] for check in found["checks"]}


# --- what it says -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("kredis", ["ZRANGEBYLEX", "GET, SET and every other Redis command", "constant :1", "6969"]),
        ("kmemcached", ["64 × 'x'", "no reply ever holds it", "6969"]),
        ("kmemcache", ["XDP on the interface", "32 × 'x'", "`ip link` prints it"]),
    ],
)
def test_a_mode_says_what_it_serves_before_anything_is_built(
    mode: str, says: list[str], own_cache: Path
) -> None:
    done = kflex("run", "--artifact", "--mode", mode, "--dry-run")
    assert done.returncode == 3 and all(words in done.stdout for words in says), done.stdout
    assert "kflex-repro build --artifact --source DIR" in refusal(done)


def test_what_is_missing_here_is_named(built: Path) -> None:
    """No kernel that these tests run on knows the heap; everything else is there."""
    found = report("--mode", "kmemcached", "--source", built)
    assert checks(found) == {
        "the build": "ok",
        "root": "ok" if os.geteuid() == 0 else "missing",
        "heap map type": "missing",
        "kernel functions": "ok",
        "heap": "ok",
        "cgroup v2": "ok" if fs.cgroup2_root() else "missing",
        "port": "ok",
    }
    assert found["command"][1:] == ["--kmemcached"] and "heap-size" in found["recipes"]
    line = refusal(kflex("run", "--artifact", "--mode", "kmemcached"))
    # What is cured first is said: a user without root is told about sudo.
    assert "heap map type" in line and ("KFlex-linux" if os.geteuid() == 0 else "sudo") in line
    # The program itself says the same, in its own way.
    done = subprocess.run([found["command"][0], "--kredis"], check=False, capture_output=True, text=True)
    assert done.returncode == 1 and "BPF_MAP_TYPE_HEAP" in done.stderr


def test_a_tree_changed_since_it_was_built_is_a_warning(built: Path) -> None:
    text = (built / "src" / "Main.cpp").read_text()
    append(built / "src" / "Main.cpp", "// later\n")
    try:
        assert checks(report("--mode", "kredis", "--source", built))["the build"] == "warning"
    finally:
        (built / "src" / "Main.cpp").write_text(text)
    assert checks(report("--mode", "kredis", "--source", built))["the build"] == "ok"


def test_a_damaged_build_is_not_run(tree: Path) -> None:
    made = build(tree, *PLAIN, "--program-only")
    Path(made["program"]).write_bytes(b"\x7fELF")
    line = refusal(kflex("run", "--artifact", "--mode", "kredis"))
    assert "gone or damaged" in line or "the build" in line
    assert f"build --artifact --source {tree}" in line


def test_heaps_larger_than_memory_are_missing_memory(tree: Path) -> None:
    """As the artifact declares them: 256 GB."""
    if model.machine().ram_available > 256 * model.GIB:
        pytest.skip("this machine has the memory")
    build(tree, *PLAIN, "--program-only")
    found = report("--mode", "kmemcached", "--source", tree)
    heap = next(check for check in found["checks"] if check["name"] == "heap")
    assert heap["state"] == "missing" and "256" in heap["value"] and "--heap-gb auto" in heap["fix"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--mode", "kmemcache"], "no interface was chosen"),
        (["--mode", "kmemcache", "--ifindex", "99999"], "no network interface 99999"),
        (["--mode", "kmemcache", "--interface", "nosuch0"], "no network interface nosuch0"),
        (["--mode", "kmemcache", "--ifindex", "99999", "--interface", "lo"], "no network interface 99999"),
        (["--mode", "kredis", "--ifindex", "1"], "--mode kredis uses no interface"),
        (["--mode", "kredis", "--source", "nowhere"], "no such directory"),
    ],
)
def test_bad_choices_are_one_line(own_cache: Path, words: list[str], expected: str) -> None:
    assert expected in refusal(kflex("run", "--artifact", *words))


# --- the kernel, by name ----------------------------------------------------------------------------------


def test_the_heap_type_is_looked_for_by_name(knowing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "KERNEL_BTF", knowing)
    assert kernel.map_type("BPF_MAP_TYPE_HEAP") == btf.load(knowing).enum("bpf_map_type")["BPF_MAP_TYPE_HEAP"]
    assert kernel.map_type("BPF_MAP_TYPE_HE") is None
    assert needs.heap_type().state == "ok"


def test_functions_the_kernel_lacks_are_named(
    knowing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "calls.bpf.c"
    source.write_text(
        '#define __ksym __attribute__((section(".ksyms")))\n'
        "extern int bpf_known(void) __ksym;\nextern int bpf_unheard_of(void) __ksym;\n"
        "extern int bpf_not_needed(void) __ksym __attribute__((weak));\n"
        '__attribute__((section("tc"))) int calls(void *context)\n'
        "{\n\treturn bpf_known() + bpf_unheard_of() + (bpf_not_needed ? bpf_not_needed() : 0);\n}\n"
    )
    made = tmp_path / "calls.bpf.o"
    subprocess.run(
        [toolchain.clang().path, "-target", "bpf", "-g", "-O2", "-c", source, "-o", made], check=True
    )
    assert kernel.externs(made) == {"bpf_known", "bpf_unheard_of"}
    monkeypatch.setattr(kernel, "KERNEL_BTF", knowing)
    assert kernel.lacking([made]) == [kernel.Lacking("bpf_unheard_of", ("calls.bpf.o",))]
    check = needs.functions([made])
    assert check.state == "missing" and "bpf_unheard_of" in check.value


# --- running it -------------------------------------------------------------------------------------------


def test_it_runs_where_the_kernel_can_and_ends_with_ctrl_c(built: Path, knowing: Path) -> None:
    require("root", "capabilities", "cgroup2")
    # The one thing that is not real: whose BTF is read. A network namespace of its own keeps the port free.
    text = (
        "import sys\nfrom pathlib import Path\nfrom kflex_repro.bpf import kernel\n"
        f"kernel.KERNEL_BTF = Path({str(knowing)!r})\n"
        "from kflex_repro.cli import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    words = ["run", "--artifact", "--mode", "kmemcache", "--interface", "lo", "--source", str(built)]
    process = subprocess.Popen(
        ["unshare", "--net", sys.executable, "-c", text, *words],
        cwd=TOP,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "FFKX_KERNEL_BTF": str(knowing)},
    )
    try:
        assert process.stderr is not None
        assert process.stderr.readline() == "kmemcache ready!\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    # Without it the capacities that were planned do not fit.
    assert "MALLOC_CONF=retain:false" in out and "malloc_conf retain:false\n" in out
    assert "mode kmemcache ifindex 1" in out and "Ctrl-C ends it" in out
    assert err.split("\n") == ["kmemcache ends", "", "kflex-repro: interrupted", ""]
    assert process.returncode == 130


XDP = """
import ctypes as c, signal, socket, sys
from kflex_repro.bpf import libbpf, probe
from kflex_repro.bpf.libbpf import ProgType
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
with probe._load(ProgType.XDP, 2) as program:
    index = socket.if_nametoindex("lo")
    attach = libbpf.library().bpf_xdp_attach
    libbpf.check(attach(c.c_int(index), c.c_int(program.fd), c.c_uint32(0), None), "attach")
print("attached", flush=True)
signal.sigwait({signal.SIGTERM})
"""
RUNNER = """
import sys
from kflex_repro.run import needs, program
on = needs.interface(None, "lo")
assert on.xdp == 0
try:
    print("code", program.run([sys.executable, "-c", sys.argv[1]], on), flush=True)
finally:
    print("left", needs.xdp("lo"), flush=True)
"""


def test_its_xdp_program_is_taken_off() -> None:
    """Attached as the artifact does it, by netlink: it would outlive the process."""
    require("root", "capabilities")
    process = subprocess.Popen(
        ["unshare", "--net", sys.executable, "-c", RUNNER, XDP],
        cwd=TOP,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "attached\n", process.communicate()
        namespaced = ["nsenter", f"--net=/proc/{process.pid}/ns/net"]
        shown = subprocess.run(
            [*namespaced, "ip", "link", "show", "dev", "lo"], check=True, capture_output=True, text=True
        )
        assert "xdp" in shown.stdout
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert out == "left 0\n"


def test_where_the_program_looks_for_cgroup2_is_read_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_it_is, changed = tmp_path / "as-it-is", tmp_path / "changed"
    as_it_is.write_bytes(b"\x7fELF...\0/sys/fs/cgroup\0...")
    changed.write_bytes(b"\x7fELF...\0/sys/fs/cgroup/unified\0...")
    monkeypatch.setattr(fs, "cgroup2_root", lambda: Path("/sys/fs/cgroup/unified"))
    assert needs.cgroup(as_it_is, ["cgroup2-path"]).state == "ok"
    assert needs.cgroup(as_it_is).state == "missing" and needs.cgroup(changed).state == "ok"
    monkeypatch.setattr(fs, "cgroup2_root", lambda: Path("/sys/fs/cgroup"))
    assert needs.cgroup(as_it_is).state == "ok"
    monkeypatch.setattr(fs, "cgroup2_root", lambda: None)
    assert "mount -t cgroup2" in needs.cgroup(changed).fix


def test_somebody_elses_xdp_program_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "xdp", lambda _name: 7)
    on = needs.interface(None, "lo")
    found = {check.name: check for check in needs.of_mode(MODES["kmemcache"], (), None, (), on)}
    assert found["interface"].state == "missing" and "id 7" in found["interface"].value
    # And what was there before us is not taken off after us either.
    assert program.take_off(on) is False


def test_a_port_in_use_is_said() -> None:
    with contextlib.closing(socket.socket()) as listening:
        try:
            listening.bind(("127.0.0.1", 6969))
            listening.listen()
        except OSError:
            pass  # Somebody listens there: what the test wants.
        check = needs.port()
    assert check.state == "missing" and "6969" in check.value
