"""Logging in as somebody else than root: sudo, as far as it lets us, and results that this user can fetch.

The user exists only in the daemon's mount namespace.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import require, unavailable
from tests.remote.sshd import Host, host

USER, UID = "kflex-login", 54321
SUDOERS = f"root ALL=(ALL) ALL\n{USER} ALL=(root) NOPASSWD: %s remote-agent\n"


@pytest.fixture(scope="module")
def there() -> Iterator[Host]:
    """A host with that user, who may run the toolkit's agent as root."""
    require("root", "capabilities")
    if not shutil.which("sudo"):
        unavailable("no sudo: scripts/setup --tests installs it")
    # Not pytest's directory: only root may look into that.
    base = Path(tempfile.mkdtemp(prefix="kflex-ssh-"))
    base.chmod(0o755)
    try:
        files = {
            "passwd": f"{USER}:x:{UID}:{UID}::{base}:/bin/sh\n",
            "group": f"{USER}:x:{UID}:\n",
            "shadow": f"{USER}:*:19000:0:99999:7:::\n",
        }
        binds = []
        for name, line in files.items():
            (base / name).write_text(Path("/etc", name).read_text() + line)
            (base / name).chmod(0o644 if name != "shadow" else 0o600)
            binds.append(f"mount --bind {base / name} /etc/{name}")
        (base / "sudoers").write_text(SUDOERS % (base / "bin" / "kflex-repro"))
        (base / "sudoers").chmod(0o440)
        binds.append(f"mount --bind {base / 'sudoers'} /etc/sudoers")
        script = " && ".join([*binds, 'exec "$@"'])
        prefix = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
        with host(base, prefix, user=USER) as one:
            (base / "authorized_keys").chmod(0o644)
            yield one
            one.nothing_left()
    finally:
        shutil.rmtree(base)


def test_what_root_measured_is_fetched_by_the_user(there: Host, tmp_path: Path) -> None:
    require("tp_btf")
    png = tmp_path / "chart.png"
    ran = there.run("trace", "syscalls", "--duration", "0.2", "--json", "--png", png)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["syscalls"] and png.read_bytes().startswith(b"\x89PNG")


def test_who_it_is_there(there: Host) -> None:
    script = there.toolkit.read_text()
    there.install('echo "uid $(id -u)" >&2; exit 1')
    try:
        asked = {one: there.run("trace", "list", "syscalls", *one).stderr for one in ((), ("--no-sudo",))}
    finally:
        there.toolkit.write_text(script)
    assert "uid 0 " in asked[()] and f"uid {UID} " in asked[("--no-sudo",)]


def test_sudo_that_asks_for_a_password(there: Host) -> None:
    allowed = (there.base / "sudoers").read_text()
    try:
        # In place: what is bound over /etc/sudoers is this file.
        with (there.base / "sudoers").open("r+") as file:
            file.truncate()
            file.write(f"root ALL=(ALL) ALL\n{USER} ALL=(root) ALL\n")
        ran = there.run("trace", "list", "syscalls", "--match", "read")
    finally:
        with (there.base / "sudoers").open("r+") as file:
            file.truncate()
            file.write(allowed)
    assert ran.returncode == 1 and ran.stderr.count("\n") == 1
    assert "sudo there does not let us in without a password" in ran.stderr and "NOPASSWD" in ran.stderr
