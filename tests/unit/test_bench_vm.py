"""Where the benchmark runs, and what comes back from a VM: marked; of an emulated one, without ratios."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kflex_repro import host, patience
from kflex_repro.bench import canvas, cli, guest, place, plot, probe_plot
from kflex_repro.bench.guest import Guest
from kflex_repro.bench.mark import EMULATED, VIRTUAL, mark, without_ratios
from kflex_repro.bench.report import render
from kflex_repro.bench.result import read_result, write_document
from kflex_repro.bench.run import Options, make_plan
from kflex_repro.bench.scenario import load_emulation, load_scenarios
from kflex_repro.bench.summary import closing_line, headings, missed_targets, rows
from kflex_repro.errors import KflexError, Unavailable
from kflex_repro.host import Fact
from kflex_repro.vm.kernels import Kernel
from kflex_repro.vm.run import Outcome
from kflex_repro.vm.toolkit import Lines
from tests.unit.test_bench_result import result

RATIO = re.compile(r"\d\s?×(?! \d+ pair)")


def emulated(*names: str, mismatches: int = 0) -> dict[str, Any]:
    made = result(*names, mismatches=mismatches)
    return replace(made, host={"kernel": "6.12", "emulated": True}).to_json()


# --- where it runs ----------------------------------------------------------------------------------------


def fact(key: str, of_kernel: bool, value: str = "EPERM") -> Fact:
    return Fact(key, key.upper(), "missing", value, "", f"fix {key}", True, True, of_kernel)


class Host:
    """A host that lacks ``lacking``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lacking: tuple[Fact, ...] = ()
        self.root = True
        monkeypatch.delenv("KFLEX_VM", raising=False)
        monkeypatch.setattr(host, "missing", lambda: self.lacking)
        monkeypatch.setattr(host, "is_root", lambda: self.root)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch)


def test_a_host_that_can_runs_it_itself(here: Host) -> None:
    assert place.choose(None) == place.choose(False) == place.Place(vm=False)
    assert place.choose(None, attach=":6379").vm is False


def test_a_vm_can_be_asked_for(here: Host) -> None:
    assert place.choose(True).vm is True


def test_where_bpf_is_refused_a_vm_is_taken_and_the_facts_are_named(here: Host) -> None:
    here.lacking = (fact("sk_msg", True), fact("capabilities", True, "without CAP_BPF"))
    chosen = place.choose(None)
    assert chosen.vm
    assert "SK_MSG" in chosen.why and "without CAP_BPF" in chosen.why and "\n" not in chosen.why


def test_by_no_means_in_a_vm_says_why_not_here_and_what_to_do(here: Host) -> None:
    here.lacking = (fact("sk_msg", True),)
    with pytest.raises(Unavailable, match=r"SK_MSG.*leave out --no-vm") as caught:
        place.choose(False)
    assert caught.value.exit_code == 3
    here.root = False
    with pytest.raises(Unavailable, match="sudo"):
        place.choose(False)


def test_a_server_of_this_host_cannot_be_benchmarked_in_a_vm(here: Host) -> None:
    with pytest.raises(KflexError) as caught:
        place.choose(True, attach=":6379")
    assert caught.value.exit_code == 2
    here.lacking = (fact("sk_msg", True),)
    with pytest.raises(Unavailable, match="--attach"):
        place.choose(None, attach=":6379")


@pytest.mark.parametrize("vm", [True, None])
def test_what_a_vm_would_lack_too_is_said_before_it_boots(here: Host, vm: bool | None) -> None:
    here.lacking = (fact("sk_msg", True), fact("clang", False, "not found"))
    with pytest.raises(Unavailable, match=r"CLANG: not found.*fix clang"):
        place.choose(vm)


def test_there_is_no_vm_in_a_vm(here: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFLEX_VM", "1")
    here.lacking = (fact("sk_msg", True),)
    assert place.choose(None).vm is False
    with pytest.raises(KflexError, match="already"):
        place.choose(True)


def test_a_user_who_may_not_is_told_what_a_dry_run_would_do(here: Host) -> None:
    here.root = False
    here.lacking = (fact("capabilities", True, "without CAP_BPF"),)
    said = CliRunner().invoke(cli.group, ["redis", "--quick", "--dry-run"])
    assert said.exit_code == 0 and "would boot a VM" in said.output and "without CAP_BPF" in said.output
    planned = CliRunner().invoke(cli.group, ["redis", "--quick", "--dry-run", "--json"])
    plan = json.loads(planned.output)
    assert plan["vm"] is True and plan["emulated"] is True
    refused = CliRunner().invoke(cli.group, ["redis", "--no-vm", "--quick"])
    assert isinstance(refused.exception, Unavailable)


# --- what is run there ------------------------------------------------------------------------------------


def test_the_emulated_set_is_small_and_short() -> None:
    small = load_emulation()
    full, quick = make_plan(Options(emulated=True)), make_plan(Options(emulated=True, quick=True))
    assert [s.name for s in quick.scenarios] == list(small.quick)
    assert full.estimate_s < 600 and quick.estimate_s < full.estimate_s
    for scenario in full.scenarios:
        assert scenario.clients <= small.clients and scenario.keys <= small.keys and not scenario.targets
        assert scenario.rate <= small.rate
    # A scenario asked for by name is run, however large it is: small.
    (named,) = make_plan(Options(emulated=True, names=("get-c200",), pairs=2, seconds=1.5)).scenarios
    assert named.clients == small.clients
    # Both kinds of key and value, every command, with and without coherence.
    chosen = set(small.scenarios)
    assert {s.op for s in load_scenarios() if s.name in chosen} >= {"GET", "SET", "MIX", "LPUSH"}


def test_a_mistake_in_the_emulated_set_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "scenarios.toml"
    scenario = '[[scenario]]\nname = "a"\nabout = "b"\nop = "GET"\n'
    rest = "pairs = 1\nseconds = 1.0\nquick_seconds = 1.0\nclients = 1\nkeys = 1\nrate = 1\n"
    path.write_text(scenario)
    with pytest.raises(KflexError, match=r"\[emulation\] needs"):
        load_emulation(path)
    path.write_text(f'{scenario}[emulation]\nscenarios = ["x"]\nquick = []\n{rest}')
    with pytest.raises(KflexError, match="no scenario of the file: x"):
        load_emulation(path)


def test_the_guest_is_asked_for_what_the_user_asked_for() -> None:
    options = Options(None, True, ("get-2t", "set-*"), 2, 1.5, True, Path("/x"), 500, 7000, True)
    words = guest.arguments(options)
    assert words[:4] == ["bench", "redis", "--no-vm", "--raw"]
    parsed = cli.redis.make_context("redis", words[2:]).params
    assert (parsed["quick"], parsed["names"], parsed["pairs"]) == (True, ("get-2t", "set-*"), 2)
    assert (parsed["seconds"], parsed["netns"], parsed["keys"]) == (1.5, True, 500)
    assert (parsed["port"], parsed["with_probe"], parsed["vm"], parsed["raw"]) == (7000, True, False, True)
    assert parsed["out"] is None


def test_lines_are_whole_however_they_come() -> None:
    taken: list[str] = []
    lines = Lines(taken.append)
    for part in (b'{"a"', b": 1}\r\n\n{", b'"b": 2}\nrest'):
        lines(part)
    assert taken == ['{"a": 1}', '{"b": 2}']


# --- what comes back --------------------------------------------------------------------------------------


class Vm:
    """Stands in for kflex_repro.vm.run: a guest that says ``lines`` and leaves ``document``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.kernel = Kernel("6.12", "6.12.1-cloud", tmp_path / "vmlinuz", None, "linux-image-6.12.1-cloud")
        self.document: Mapping[str, Any] | None = result("get-2t").to_json()
        self.out, self.err, self.status, self.accel = b"", b"", 0, "tcg"
        self.error: BaseException | None = None
        self.request: Any = None
        monkeypatch.setattr(guest.kernels, "find", lambda *_: self.kernel)
        monkeypatch.setattr(guest.run, "prepare", lambda *_: None)
        monkeypatch.setattr(guest.run, "run", self.run)

    def run(self, request: Any, stdout: Any, stderr: Any, _note: Any, progress: Any) -> Outcome:
        self.request = request
        stdout(self.out)
        stderr(self.err)
        progress("work", 1, 2)
        if self.error:
            raise self.error
        if self.document is not None:
            (request.out / "guest").mkdir()
            write_document(self.document, request.out / "guest")
        console = Path("/cache/logs/vm.log")
        return Outcome(self.status, self.accel, self.kernel, "virtiofs", 3.0, 60.0, console, ())


@pytest.fixture
def vm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Vm:
    return Vm(monkeypatch, tmp_path)


def run_guest(out: Path) -> tuple[dict[str, Any], list[Any], list[str]]:
    events: list[Any] = []
    notes: list[str] = []
    made = Guest(
        Options(quick=True, out=out), out, "kflex-repro bench redis --vm", events.append, notes.append
    )
    return made.execute(), events, notes


def test_a_result_comes_home_marked_whatever_the_guest_took_its_cpu_for(vm: Vm, tmp_path: Path) -> None:
    vm.out, vm.err = b'{"done_s": 1.5, "text": "get-2t"}\nnot an event\n', b"a warning\n"
    assert vm.document is not None and vm.document["host"]["emulated"] is False
    document, events, notes = run_guest(tmp_path / "out")
    assert {"text": "making the guest's root, work: 50% of 0 MB"} in events
    assert {"done_s": 1.5, "text": "get-2t"} in events and notes == ["not an event", "a warning"]
    assert document == read_result(tmp_path / "out" / "result.json")
    assert document["host"]["emulated"] is True and document["command"] == "kflex-repro bench redis --vm"
    found = document["host"]["vm"]
    assert (found["accel"], found["kernel"]) == ("tcg", "linux-image-6.12.1-cloud")
    assert document["scenarios"][0]["ratio"]["rps"] is None
    assert EMULATED in (tmp_path / "out" / "report.html").read_text()
    assert not (tmp_path / "out" / "guest").exists()
    assert vm.request.command[0] == sys.executable and vm.request.timeout > 600


def test_under_kvm_a_result_is_virtual_and_keeps_its_ratios(vm: Vm, tmp_path: Path) -> None:
    vm.accel = "kvm"
    document, _, _ = run_guest(tmp_path / "out")
    assert document["host"]["emulated"] is False and mark(document) == VIRTUAL
    assert document["scenarios"][0]["ratio"]["rps"] is not None
    assert VIRTUAL in (tmp_path / "out" / "report.html").read_text()


def test_a_guest_without_a_result_is_one_line_with_its_last_words(vm: Vm, tmp_path: Path) -> None:
    vm.document, vm.status, vm.err = None, 1, b"kflex-repro: redis-server exited: Bad directive\n"
    with pytest.raises(KflexError, match=r"in the VM failed: redis-server exited: Bad directive .*vm\.log"):
        run_guest(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), KflexError("the guest panicked")])
def test_a_guest_that_is_cut_off_leaves_nothing(vm: Vm, tmp_path: Path, error: BaseException) -> None:
    vm.error = error
    with pytest.raises(type(error)):
        run_guest(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_earlier_result_stays_until_there_is_a_new_one(vm: Vm, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "result.json").write_text("the earlier one")
    vm.document = None
    with pytest.raises(KflexError):
        run_guest(out)
    assert (out / "result.json").read_text() == "the earlier one"


def test_what_was_completed_before_the_guest_failed_is_kept(vm: Vm, tmp_path: Path) -> None:
    vm.document, vm.status = result("get-2t", interrupted=True).to_json(), 1
    vm.err = b"kflex-repro: the server is gone\n"
    with pytest.raises(KflexError, match="cut short: the server is gone"):
        run_guest(tmp_path / "out")
    assert read_result(tmp_path / "out" / "result.json")["interrupted"] is True


# --- what is shown ----------------------------------------------------------------------------------------


def test_an_emulated_document_has_neither_ratios_nor_verdicts() -> None:
    real, functional = result().to_json(), emulated()
    assert without_ratios(real) == real
    for scenario in functional["scenarios"]:
        assert set(scenario["ratio"].values()) == {None} and "targets" not in scenario
        assert all(set(one.values()) == {None} for one in scenario["ratio_to"].values())
    assert missed_targets(functional) == []
    assert headings(functional) != headings(real)


def test_an_old_emulated_file_loses_its_ratios_when_it_is_read(tmp_path: Path) -> None:
    old = result("get-2t").to_json()
    old["host"]["emulated"] = True
    (tmp_path / "result.json").write_text(json.dumps(old))
    document = read_result(tmp_path / "result.json")
    assert document["scenarios"][0]["ratio"]["rps"] is None
    assert not RATIO.search(closing_line(document))


def test_the_table_counts_and_compares_nothing() -> None:
    document = emulated("get-2t", mismatches=2)
    (row,) = rows(document)
    # Three runs of each arm: see bench_fakes.
    assert row.cells == ("244,800", "336,600", "612,000", "98.0%", "300", "2")
    assert len(row.cells) == len(headings(document)) and row.targets == ()
    assert not any(RATIO.search(text) for text in (*row.cells, *headings(document)))


def test_the_closing_line_says_what_it_is_and_wrong_answers_first() -> None:
    assert closing_line(emulated("get-2t")).startswith(EMULATED)
    wrong = closing_line(emulated("get-2t", mismatches=1))
    assert wrong.startswith("WRONG ANSWERS") and EMULATED in wrong
    assert not RATIO.search(wrong)


def test_the_report_is_marked_and_quotes_nobody() -> None:
    page = re.sub(r'data:image/png;base64,[^"]*', "", render(emulated("get-2t", "get-2t-p16", "rate-get")))
    assert page.count(EMULATED) >= 3
    assert "NSDI" not in page and "Published" not in page and "Expected" not in page
    assert not RATIO.search(page)
    real = render(result("get-2t").to_json())
    assert EMULATED not in real and "Published" in real


class Drawn:
    """The texts of every plot that is drawn, and the marks on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: list[str] = []

        def png(figure: Any) -> bytes:
            found = [text.get_text() for text in figure.texts]
            found += [text.get_text() for axis in figure.axes for text in axis.texts]
            self.texts.append(" ".join(" ".join(found).split()))
            return b""

        for module in (canvas, plot, probe_plot):
            monkeypatch.setattr(module, "png", png)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    return Drawn(monkeypatch)


def test_every_plot_of_an_emulated_run_is_marked_twice(drawn: Drawn) -> None:
    document = emulated("get-2t", "set-2t", "get-2t-p16")
    assert set(plot.draw(document, canvas.LIGHT)) == {"served", "throughput", "latency", "cpu"}
    for text in drawn.texts:
        assert text.count(EMULATED) == 2 and not RATIO.search(text)


def test_plots_of_a_virtual_machine_say_so_and_those_of_a_host_nothing(drawn: Drawn) -> None:
    document = result("get-2t").to_json()
    assert "ratio" in plot.draw(document, canvas.LIGHT)
    assert not any(VIRTUAL in text or EMULATED in text for text in drawn.texts)
    drawn.texts.clear()
    document["host"]["vm"] = {"accel": "kvm"}
    plot.draw(document, canvas.LIGHT)
    assert drawn.texts and all(text.count(VIRTUAL) == 1 for text in drawn.texts)


@pytest.fixture
def asked_anew() -> Iterator[None]:
    patience.emulated.cache_clear()
    yield
    patience.emulated.cache_clear()


def test_the_raw_part_is_for_guests(asked_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KFLEX_OUT", raising=False)
    monkeypatch.setattr(cli, "check_host", lambda: None)
    said = CliRunner().invoke(cli.group, ["redis", "--raw"])
    assert isinstance(said.exception, KflexError) and "KFLEX_OUT" in str(said.exception)


def test_a_guest_does_not_wait_for_the_plotting_library() -> None:
    code = "import sys; from kflex_repro.bench import cli, guest; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
