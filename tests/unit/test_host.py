"""Facts and the doctor's report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from kflex_repro import guest_facts, host, host_cli
from kflex_repro.errors import Unavailable, os_failure

TOP = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def fresh() -> None:
    host.fact.cache_clear()


def test_every_row_says_what_it_is_for_and_how_to_get_it() -> None:
    found = host.facts()
    assert len({fact.key for fact in found}) == len(found)
    for fact in found:
        assert fact.title and fact.value and fact.purpose
        assert fact.state == "ok" or fact.fix, fact
        assert fact.required or fact.state != "missing", fact
    wanted = {
        "kernel", "btf", "sockops", "sk_msg", "sk_skb", "tcx", "tp_btf", "iter_tcp", "fentry", "kprobe",
        "arena", "cgroup2", "bpffs", "tracefs", "va_bits", "ram", "limits", "capabilities", "lockdown",
        "unprivileged_bpf", "clang", "bpftool", "libbpf", "redis",
    }  # fmt: skip
    assert wanted <= {fact.key for fact in found}
    with pytest.raises(KeyError):
        host.fact("nonsense")


def test_json_and_exit_code_agree() -> None:
    result = CliRunner().invoke(host_cli.doctor, ["--json"])
    report = json.loads(result.output)
    lacking = [fact["key"] for fact in report["facts"] if fact["required"] and fact["state"] == "missing"]
    assert report["missing"] == lacking and report["ok"] == (not lacking)
    assert result.exit_code == (1 if lacking else 0)


def test_a_missing_required_fact_is_named_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "is_root", lambda: True)

    def refuse() -> str:
        raise os_failure("bpf_prog_load", 1)

    monkeypatch.setattr(host.probe, "sk_msg", refuse)
    monkeypatch.setattr(host.probe, "tcx", refuse)
    fact = host.fact("sk_msg")
    assert fact.state == "missing" and "EPERM" in fact.value and "even to root" in fact.fix
    assert host.fact("tcx").state == "degraded"
    result = CliRunner().invoke(host_cli.doctor, [])
    assert (
        result.exit_code == 1 and "cannot run here; missing:" in result.output and "sk_msg" in result.output
    )


def test_a_newer_redis_is_not_known_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.server, "redis_version", lambda: (7, 2, 4))
    monkeypatch.setattr(host.server, "redis_binary", lambda: Path("/usr/bin/redis-server"))
    fact = host.fact("redis")
    assert fact.state == "missing" and "7.2.4" in fact.value and "7.0" in fact.fix

    def none() -> Path:
        raise Unavailable("redis-server is not installed")

    host.fact.cache_clear()
    monkeypatch.setattr(host.server, "redis_version", none)
    assert host.fact("redis").state == "missing"


def test_summary_is_json_and_names_no_machine() -> None:
    text = json.dumps(host.summary())
    assert os.uname().nodename not in text or len(os.uname().nodename) < 4
    assert json.loads(text)["facts"]["kernel"]["value"] == os.uname().release


def test_without_root_the_rows_that_need_it_are_named() -> None:
    drop = "os.setgroups([]); os.setgid(65534); os.setuid(65534)" if os.geteuid() == 0 else ""
    script = f"import os; from kflex_repro import host_cli; {drop}\nhost_cli.doctor(['--json'])\n"
    env = {**os.environ, "KFLEX_CACHE": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, cwd=TOP, env=env
    )
    assert done.returncode == 1, done.stderr
    facts = {fact["key"]: fact for fact in json.loads(done.stdout)["facts"]}
    assert facts["sk_msg"]["state"] == "missing" and facts["sk_msg"]["fix"] == "run as root"
    assert facts["tcx"]["state"] == "degraded" and facts["sk_msg"]["needs_root"]
    assert facts["cache"]["state"] == "missing" and facts["capabilities"]["state"] == "missing"


def test_what_a_vm_has_of_its_own_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "is_root", lambda: True)

    def refuse() -> str:
        raise os_failure("bpf_prog_load", 1)

    def none() -> Path:
        raise Unavailable("no clang found", fix="apt install clang")

    for name in ("mmapable", "sockops", "sk_msg", "tp_btf", "iter_tcp"):
        monkeypatch.setattr(host.probe, name, lambda: "supported")
    monkeypatch.setattr(host.probe, "sk_msg", refuse)
    monkeypatch.setattr(host.toolchain, "clang", none)
    lacking = {fact.key for fact in host.refused()}
    assert "sk_msg" in lacking and "clang" not in lacking
    assert "clang" in {fact.key for fact in host.missing()}
    assert host.refusal().startswith("this host refuses BPF") and "BPF sk_msg" in host.refusal()
    assert "\n" not in host.refusal()
    monkeypatch.setattr(host, "is_root", lambda: False)
    assert host.refusal().startswith("this user may not use BPF")


def lacking(*keys: str, of_kernel: bool = True) -> tuple[host.Fact, ...]:
    return tuple(host.Fact(key, key, "missing", "", "", "", True, True, of_kernel) for key in keys)


def with_fact(monkeypatch: pytest.MonkeyPatch, key: str, state: host.State) -> None:
    real = host.fact

    def fact(asked: str) -> host.Fact:
        found = real(asked)
        return replace(found, state=state, fix=f"get {key}") if asked == key else found

    monkeypatch.setattr(host, "fact", fact)


def test_where_a_vm_would_do_doctor_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with_fact(monkeypatch, "qemu", "ok")
    with_fact(monkeypatch, "kvm", "ok")
    monkeypatch.setattr(host, "missing", lambda: lacking("sk_msg"))
    said = CliRunner().invoke(host_cli.doctor, [])
    assert said.exit_code == 1 and "make bench runs it in a VM instead" in said.output
    with_fact(monkeypatch, "kvm", "degraded")
    assert "emulated" in CliRunner().invoke(host_cli.doctor, []).output
    with_fact(monkeypatch, "qemu", "degraded")
    assert "if QEMU were there: get qemu" in CliRunner().invoke(host_cli.doctor, []).output
    monkeypatch.setattr(host, "missing", lambda: (*lacking("sk_msg"), *lacking("clang", of_kernel=False)))
    assert "in a VM" not in CliRunner().invoke(host_cli.doctor, []).output.splitlines()[-1]


def test_doctor_shows_a_guests_facts_beside_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = json.loads(json.dumps(host.as_json()))
    for fact in theirs["facts"]:
        fact["value"] = f"theirs {fact['key']}"
    vm = {"kernel": "6.12.1-cloud", "accel": "tcg", "boot_s": 4.2}
    theirs |= {"ok": True, "missing": [], "vm": vm}
    monkeypatch.setattr(guest_facts, "ask", lambda *_: theirs)
    said = CliRunner().invoke(host_cli.doctor, ["--vm"])
    assert said.exit_code == 0 and "Linux 6.12.1-cloud, emulated (TCG), up after 4 s" in said.output
    assert os.uname().release in said.output and "theirs kernel" in said.output
    both = json.loads(CliRunner().invoke(host_cli.doctor, ["--vm", "--json"]).output)
    assert both["guest"] == theirs and both["host"]["facts"][0]["value"] == os.uname().release
    theirs |= {"ok": False, "missing": ["sk_msg"]}
    refused = CliRunner().invoke(host_cli.doctor, ["--vm"])
    assert refused.exit_code == 1 and "cannot run in the VM; missing: BPF sk_msg" in refused.output
    assert CliRunner().invoke(host_cli.doctor, ["--vm", "--hello"]).exit_code == 2
