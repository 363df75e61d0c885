"""Who is let in, and whom we talk to: host keys and logins."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from tests.remote.sshd import Host, fingerprint, keygen

LIST = ("trace", "list", "syscalls", "--match", "read")


def refused(there: Host, *words: str | Path) -> str:
    """The one line that a run ends with."""
    ran = there.run(*LIST, *words)
    assert ran.returncode == 1 and ran.stdout == "", ran
    assert ran.stderr.startswith("kflex-repro: ") and ran.stderr.count("\n") == 1, ran.stderr
    return ran.stderr


def accepted(there: Host, *words: str | Path) -> None:
    """It ran there."""
    ran = there.run(*LIST, *words)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.split() == ["0", "read"]


def test_an_unknown_host_is_refused_and_the_command_in_the_message_accepts_it(there: Host) -> None:
    shutil.rmtree(there.home / ".ssh" / "known_hosts", ignore_errors=True)
    (there.home / ".ssh" / "known_hosts").unlink()
    line = refused(there)
    assert "the host key is not known" in line and fingerprint(there.base / "host_ed25519") in line
    shown = re.search(r"accept it: (.*)$", line)
    assert shown is not None
    subprocess.run(shown[1], shell=True, check=True, env=there.environment())
    accepted(there)


def test_a_changed_host_key_is_refused_loudly(there: Host) -> None:
    known = fingerprint(there.base / "host_ed25519")
    keygen(there.base / "host_ed25519")
    there.serve()
    line = refused(there)
    assert "THE HOST KEY HAS CHANGED" in line
    assert known in line and fingerprint(there.base / "host_ed25519") in line
    # The command in the message forgets the old key; then the host is unknown, not trusted.
    shown = re.search(r"(ssh-keygen -R '\S+')", line)
    assert shown is not None
    subprocess.run(
        f"{shown[1]} -f {there.home}/.ssh/known_hosts", shell=True, check=True, capture_output=True
    )
    assert "the host key is not known" in refused(there)


def test_a_key_of_another_kind_is_a_changed_key(there: Host) -> None:
    kind, key = keygen(there.base / "other", "ecdsa").with_suffix(".pub").read_text().split()[:2]
    (there.home / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{there.port} {kind} {key}\n")
    assert "THE HOST KEY HAS CHANGED" in refused(there)


def test_hashed_known_hosts_are_understood(there: Host) -> None:
    subprocess.run(
        ["ssh-keygen", "-H", "-f", there.home / ".ssh" / "known_hosts"], check=True, capture_output=True
    )
    assert "127.0.0.1" not in (there.home / ".ssh" / "known_hosts").read_text()
    accepted(there)


def test_a_key_that_is_not_authorized_is_refused(there: Host, here: Path) -> None:
    line = refused(there, "--identity", keygen(here / "stranger"))
    assert "login as root refused" in line and str(here / "stranger") in line and "ssh-copy-id" in line


def test_a_key_with_a_passphrase_is_for_an_agent(there: Host, here: Path) -> None:
    locked = keygen(here / "locked", passphrase="open sesame")
    assert "has a passphrase" in refused(there, "--identity", locked)
    # In an agent it is as good as any other.
    authorized = there.base / "authorized_keys"
    before = authorized.read_text()
    own = there.home / ".ssh" / "id_ed25519"
    (here / "askpass").write_text("#!/bin/sh\necho open sesame\n")
    (here / "askpass").chmod(0o755)
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", here / "socket"], stdout=subprocess.PIPE)
    try:
        assert agent.stdout is not None and agent.stdout.readline()
        own.rename(here / "aside")
        authorized.write_text((here / "locked.pub").read_text())
        there.env["SSH_AUTH_SOCK"] = str(here / "socket")
        ask = {"SSH_ASKPASS": str(here / "askpass"), "SSH_ASKPASS_REQUIRE": "force"}
        subprocess.run(
            ["ssh-add", "-q", locked],
            check=True,
            env={**there.environment(), **ask},
            stdin=subprocess.DEVNULL,
        )
        accepted(there)
    finally:
        del there.env["SSH_AUTH_SOCK"]
        authorized.write_text(before)
        (here / "aside").rename(own)
        agent.terminate()
        agent.wait()


def test_a_password_is_asked_for_on_a_terminal_only(there: Host) -> None:
    assert "--password-prompt needs a terminal" in refused(there, "--password-prompt")


def test_the_ssh_configuration_names_hosts(there: Host) -> None:
    config = there.home / ".ssh" / "config"
    key = (there.home / ".ssh" / "id_ed25519").rename(there.home / "elsewhere")
    try:
        config.write_text(
            f"Host lab\n  HostName 127.0.0.1\n  Port {there.port}\n  User root\n  IdentityFile {key}\n"
            "Host behind\n  ProxyJump lab\n"
        )
        ran = there.run(*LIST, "--host", "lab", host=False)
        assert (ran.returncode, ran.stderr) == (0, "")
        ran = there.run(*LIST, "--host", "behind", host=False)
        assert ran.returncode == 1 and "proxyjump" in ran.stderr and "forward a port" in ran.stderr
    finally:
        config.unlink()
        key.rename(there.home / ".ssh" / "id_ed25519")
