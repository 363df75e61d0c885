"""Building kernels: what is kept, going on after a kill, first errors, estimates, bad input."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kflex_repro.build import artifact_source, cache, kernel_build, kernel_needs, kernel_source
from kflex_repro.errors import KflexError
from tests.unit import kernel_fakes
from tests.unit.kernel_fakes import fragment

DEADLINE = 60.0


@dataclass
class House:
    """A small kernel, a cache, and the command line."""

    top: Path
    source: Path
    fragment: Path
    env: dict[str, str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def cache(self) -> Path:
        return Path(self.env["KFLEX_CACHE"])

    @property
    def gate(self) -> Path:
        """While this pipe is there, the third object's compiler waits for a word on it."""
        return Path(self.env["GATE"])

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-m",
            "kflex_repro",
            "build",
            "--kernel",
            "--arch",
            "x86_64",
            "--jobs",
            "1",
        ]
        command += ["--source", str(self.source), "--fragment", str(self.fragment), *arguments]
        process = subprocess.Popen(
            command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.started.append(process)
        return process

    def build(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=DEADLINE)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def made(self, *arguments: str) -> dict[str, object]:
        done = self.build("--json", *arguments)
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert isinstance(answer, dict)
        return answer

    def reach_the_gate(self, process: subprocess.Popen[str]) -> int:
        """Wait until the third object is being compiled; returns the pipe's end that holds it there."""
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # ENXIO: nobody reads yet
                return os.open(self.gate, os.O_WRONLY | os.O_NONBLOCK)
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        raise AssertionError("the third object was not reached")

    def log(self) -> list[str]:
        (log,) = (self.cache / "logs").glob(f"kernel-{'[0-9a-f]' * 12}.log")
        return log.read_text().splitlines()

    def compiled(self) -> list[str]:
        return [line.split()[1] for line in self.log() if line.startswith("  CC")]

    def processes(self) -> list[str]:
        """What runs in the cache, whoever started it."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if str(self.cache) in words or str(self.gate) in words:
                    found.append(words)
        return found

    def quiet(self) -> bool:
        deadline = time.monotonic() + DEADLINE
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.02)
        return not self.processes()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    source = kernel_fakes.tree(tmp_path / "small")
    wish = fragment(tmp_path / "wish.config", "CONFIG_FUSE_FS=y", "CONFIG_VIRTIO_FS=y")
    env = {
        **os.environ,
        "PATH": kernel_fakes.tools(tmp_path / "bin"),
        "KFLEX_CACHE": str(tmp_path / "cache"),
        "GATE": str(tmp_path / "gate"),
        "COLUMNS": "200",
    }
    # The default fragments are the real kernel's; of ours, only the architecture's is taken unasked.
    pieces = tmp_path / "pieces"
    for name in ("bpf", "module", "kernel"):
        (pieces / name).mkdir(parents=True)
    fragment(pieces / "kernel" / "x86.config", "CONFIG_64BIT=y")
    env["KFLEX_SOURCE"] = str(pieces)
    here = House(tmp_path, source, wish, env)
    yield here
    for process in here.started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def test_the_outputs_are_kept_and_found_again(house: House) -> None:
    first = house.made()
    path = Path(str(first["path"]))
    assert first["built"] and path.parent == house.cache / "kernel"
    kept = {item.name for item in path.iterdir()}
    assert kept == {"image", "config", "System.map", "release", "build.json", "manifest.json"}
    assert (path / "release").read_text().strip() == "6.99.1-small"
    assert "CONFIG_VIRTIO_FS=y" in (path / "config").read_text().splitlines()
    kernel = first["kernel"]
    assert isinstance(kernel, dict)
    assert (kernel["objects"], kernel["arch"], kernel["origin"]) == (3, "x86_64", str(house.source))
    # The object tree went; the source was only read.
    assert not list((house.cache / "kernel-work").iterdir())
    assert not (house.source / ".config").exists() and not list(house.source.rglob("*.o"))
    again = house.made()
    assert not again["built"] and again["path"] == first["path"]
    assert house.made("--force")["built"]


def test_another_source_or_configuration_is_another_kernel(house: House) -> None:
    first = house.made()
    (house.source / "one.c").write_text("int one_more;\n")
    second = house.made()
    fragment(house.fragment, "CONFIG_NET=y")
    third = house.made()
    assert len({str(one["path"]) for one in (first, second, third)}) == 3
    text = (Path(str(second["path"])) / "System.map").read_text()
    assert "one_more" in text and "one_more" not in (Path(str(first["path"])) / "System.map").read_text()


def test_modules_are_kept_where_there_are_any(house: House) -> None:
    fragment(house.fragment, "CONFIG_MODULES=y")
    path = Path(str(house.made()["path"]))
    assert (path / "modules/lib/modules/6.99.1-small/modules.dep").exists()


def test_btf_is_kept_as_the_kernel_has_it(house: House) -> None:
    fragment(house.fragment, "CONFIG_DEBUG_INFO_BTF=y")
    path = Path(str(house.made()["path"]))
    assert (path / "btf").read_bytes() == (path / "System.map").read_bytes()  # its stand-in


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_leaves_no_compiler_and_goes_on(house: House, signum: signal.Signals) -> None:
    os.mkfifo(house.gate)
    process = house.start()
    held = house.reach_the_gate(process)
    try:
        process.send_signal(signum)
        _, err = process.communicate(timeout=DEADLINE)
        assert process.returncode != 0 and "Traceback" not in err
        if signum == signal.SIGINT:
            assert "interrupted" in err and process.returncode == 130
        # make and its compiler end without us, too: they were waiting at the gate, and would for ever.
        assert house.quiet(), house.processes()
    finally:
        os.close(held)
    assert not list((house.cache / "kernel").glob("[!.]*"))
    plan = house.made("--dry-run")["plan"]
    assert isinstance(plan, dict) and plan["made"] == 3  # the third was begun
    house.gate.unlink()
    assert house.made()["built"]
    assert house.compiled() == ["one.o", "two.o", "three.o", "three.o"]
    assert not list((house.cache / "kernel-work").iterdir())


def test_a_second_process_waits_and_finds_it_built(house: House) -> None:
    os.mkfifo(house.gate)
    first = house.start("--json")
    held = house.reach_the_gate(first)
    second = house.start("--json")
    os.write(held, b"go\n")
    os.close(held)
    answers = [json.loads(one.communicate(timeout=DEADLINE)[0]) for one in (first, second)]
    assert answers[0]["path"] == answers[1]["path"]
    assert [answer["built"] for answer in answers] == [True, False]


def test_the_first_error_is_named_and_what_is_done_stays_done(house: House) -> None:
    right = (house.source / "two.c").read_text()
    (house.source / "two.c").write_text("int two = wrong;\n")
    done = house.build()
    (line,) = [one for one in done.stderr.splitlines() if one.startswith("kflex-repro:")]
    assert done.returncode == 1 and "two.c:1" in line and "wrong" in line
    log = Path(line.rsplit(" ", 1)[1])
    assert "error" in log.read_text()
    # Another source is another key: what the failed build left of the same tree is not kept beside it.
    (house.source / "two.c").write_text(right)
    os.mkfifo(house.gate)
    process = house.start()
    held = house.reach_the_gate(process)
    assert len(list((house.cache / "kernel-work").iterdir())) == 1
    os.write(held, b"go\n")
    os.close(held)
    assert process.wait(DEADLINE) == 0


def test_a_damaged_kernel_is_built_again(house: House) -> None:
    path = Path(str(house.made()["path"]))
    (path / "image").write_bytes(b"rot")
    assert house.made()["built"]
    assert (path / "image").read_bytes()[:4] == b"\x7fELF"


def test_a_dropped_option_stops_the_build_unless_it_is_allowed(house: House) -> None:
    fragment(house.fragment, "CONFIG_VIRTIO_FS=y")
    done = house.build()
    assert done.returncode == 1 and "CONFIG_VIRTIO_FS=y (wish.config:1) is n: it needs FUSE_FS" in done.stderr
    assert not (house.cache / "kernel").exists()
    dry = house.build("--dry-run")
    assert dry.returncode == 1 and "dropped  CONFIG_VIRTIO_FS=y" in dry.stdout
    answer = house.made("--allow-dropped")
    config = answer["config"]
    assert isinstance(config, dict) and config["dropped"][0]["why"] == "it needs FUSE_FS (FUSE_FS is n)"


def test_a_dry_run_says_what_would_be_and_builds_nothing(house: House) -> None:
    done = house.build("--dry-run")
    assert done.returncode == 0 and "to build   about" in done.stdout and "6.99.1-small" in done.stdout
    assert not (house.cache / "kernel").exists() and not (house.cache / "kernel-work").exists()
    path = str(house.made()["path"])
    assert f"in the cache: {path}" in house.build("--dry-run").stdout


def test_progress_is_said_in_lines_where_there_is_no_terminal(house: House) -> None:
    house.made()
    (house.source / "one.c").write_text("int other;\n")
    # The total is the last build's.
    assert "kernel: 3 of about 3 objects" in house.build().stderr


# --- what is missing, and what is wrong -------------------------------------------------------------------


def test_missing_tools_are_named_with_what_installs_them(house: House) -> None:
    only = house.top / "only"
    only.mkdir()
    for name in ("gcc", "make", "sh", "apt-cache", "perl", "xz", "ld"):
        if found := shutil.which(name):
            (only / name).symlink_to(found)
    house.env["PATH"] = str(only)
    fragment(house.fragment, "CONFIG_DEBUG_INFO_BTF=y")
    done = house.build()
    assert done.returncode == 3 and len(done.stderr.splitlines()) == 1
    assert "not installed: flex, bison, bc, pahole" in done.stderr
    assert "apt install flex bison bc dwarves" in done.stderr
    dry = house.build("--dry-run", "--json")
    assert dry.returncode == 3 and json.loads(dry.stdout)["apt"] == "apt install flex bison bc dwarves"


def test_no_space_is_said_before_it_starts(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFLEX_CACHE", str(tmp_path / "cache"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(kernel_needs.shutil, "disk_usage", lambda _path: usage._replace(free=1_000_000_000))
    whole = kernel_needs.space(2000, 0, unpacked=False)
    with pytest.raises(
        KflexError, match=rf"the build needs {whole / 1e9:.1f} GB, 1.0 GB are free.*KFLEX_CACHE"
    ):
        kernel_needs.demand_space(whole)
    # A build that is nearly done needs less than one that begins.
    assert kernel_needs.space(2000, 1990, unpacked=True) < 1_000_000_000
    kernel_needs.demand_space(kernel_needs.space(2000, 1990, unpacked=True))


@pytest.mark.parametrize("left", [".config", "include/config/auto.conf", "arch/x86/include/generated/x.h"])
def test_a_tree_that_was_built_in_is_refused(house: House, left: str) -> None:
    (house.source / left).parent.mkdir(parents=True, exist_ok=True)
    (house.source / left).touch()
    done = house.build()
    assert done.returncode == 1 and f"make -C {house.source} mrproper" in done.stderr


def test_what_is_no_kernel_tree(house: House, tmp_path: Path) -> None:
    with pytest.raises(KflexError, match="no such directory"):
        kernel_source.directory(tmp_path / "nowhere")
    with pytest.raises(KflexError, match="not a directory"):
        kernel_source.directory(house.source / "Makefile")
    with pytest.raises(KflexError, match="not a kernel tree: no Makefile, Kbuild, Kconfig") as caught:
        kernel_source.directory(tmp_path)
    assert "--source wants" in str(caught.value)
    with pytest.raises(KflexError, match=f"--source {house.source}$"):
        kernel_source.directory(house.source / "lib")
    (house.source / "Makefile").write_text("all:\n")
    with pytest.raises(KflexError, match="Makefile has no VERSION"):
        kernel_source.directory(house.source)


def test_options_that_do_not_go_together(house: House) -> None:
    assert "--distro is the distribution's source" in house.build("--distro").stderr
    assert "not for --kernel" in house.build("--only", "latency").stderr
    command = [sys.executable, "-m", "kflex_repro", "build", "--arch", "riscv64"]
    alone = subprocess.run(command, check=False, capture_output=True, text=True, env=house.env)
    assert alone.returncode == 2 and "want --kernel" in alone.stderr


# --- the artifact's kernel --------------------------------------------------------------------------------


def artifact(top: Path) -> Path:
    for name in (artifact_source.HEAP_HEADER, artifact_source.MAIN, "CMakeLists.txt", "bpf/Makefile"):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).touch()
    return top


def test_the_artifacts_kernel_is_built_where_it_is(house: House) -> None:
    top = artifact(house.top / "KFlex")
    house.source.rename(top / "linux")
    house.source = top
    assert house.made("--artifact")["source"] == str(top / "linux")


def test_where_the_artifacts_kernel_is_absent_it_is_said_what_to_get(tmp_path: Path) -> None:
    top = artifact(tmp_path / "KFlex")
    with pytest.raises(KflexError, match=f"git clone --depth 1 https://.*KFlex-linux {top}/linux$"):
        artifact_source.kernel(top)
    (top / ".git").mkdir()
    (top / ".gitmodules").write_text('[submodule "linux"]\n\tpath = linux\n\turl = https://example.org/x\n')
    (top / "linux").mkdir()
    with pytest.raises(KflexError, match=f"git -C {top} submodule update --init --depth 1 linux$"):
        artifact_source.kernel(top)
    with pytest.raises(KflexError, match="no KFlex source tree was given"):
        artifact_source.kernel(None)


# --- estimates --------------------------------------------------------------------------------------------


def test_the_time_left_is_this_runs_rate() -> None:
    assert kernel_build.remaining(100, 300, 50.0) == 150.0
    assert kernel_build.remaining(100, -5, 50.0) == 0.0
    assert kernel_build.remaining(3, 300, 50.0) is None
    assert kernel_build.remaining(100, 300, 1.0) is None


def test_the_total_is_that_of_the_most_alike_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFLEX_CACHE", str(tmp_path))
    arch = kernel_source.arch("x86_64")
    first = kernel_build._expected(arch, 1000)
    assert 1000 < first < 4000  # measured for the default set, not of this machine's builds
    for name, options, objects in (("one", 1000, 1500), ("two", 3000, 9000)):
        record = kernel_build.Record("r", "v", arch.name, "o", "b", (), options, objects, 1.0)
        (cache.root() / "kernel" / name).mkdir(parents=True)
        text = json.dumps(kernel_build.asdict(record))
        (cache.root() / "kernel" / name / "build.json").write_text(text)
    (cache.root() / "kernel" / "three").mkdir()
    (cache.root() / "kernel" / "three" / "build.json").write_text("{")
    assert kernel_build._expected(arch, 1100) == 1650
    assert kernel_build._expected(arch, 2900) == 8700
    assert kernel_build._expected(kernel_source.arch("riscv64"), 1000) == first
