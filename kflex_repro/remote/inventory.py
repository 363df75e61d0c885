"""``hosts.toml``: the hosts of a team, by what they are for."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kflex_repro.errors import KflexError
from kflex_repro.remote import ssh
from kflex_repro.remote.ssh import Target

ROLES = ("server", "test")
_KEYS = {"addresses": list, "user": str, "identity": str}


def load(path: Path, only: Sequence[str] = ()) -> list[Target]:
    """The hosts in the file's order; ``only``: of these names or roles. KflexError in one line."""
    try:
        with path.open("rb") as file:
            document = tomllib.load(file)
    except OSError as error:
        raise KflexError(
            f"cannot read the inventory: {error.strerror}", str(path), "see docs/remote.md"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise KflexError(f"no TOML: {error}", str(path), "see docs/remote.md") from None
    found: dict[str, tuple[str, Target]] = {}
    for role, hosts in document.items():
        if role not in ROLES or not isinstance(hosts, dict):
            raise _wrong(path, role, f"a table is [server.NAME] or [test.NAME], not [{role}]")
        for name, entry in hosts.items():
            if name in found:
                raise _wrong(path, f"{role}.{name}", "the name is there twice")
            found[name] = role, _target(path, role, name, entry)
    if not found:
        raise _wrong(path, "", "no hosts in it")
    for one in only:
        if one not in found and one not in {role for role, _ in found.values()}:
            raise KflexError(
                f"no host or role {one!r} in the inventory", str(path), f"there are {', '.join(found)}"
            )
    return [target for name, (role, target) in found.items() if not only or name in only or role in only]


def _target(path: Path, role: str, name: str, entry: Any) -> Target:
    where = f"{role}.{name}"
    # It becomes the name of a directory.
    if not all(one.isalnum() or one in "-_." for one in name) or name.startswith("."):
        raise _wrong(path, where, "a name is letters, digits, - _ .")
    if not isinstance(entry, dict):
        raise _wrong(path, where, "it is a table")
    for key, value in entry.items():
        if key not in _KEYS:
            raise _wrong(path, where, f"unknown key {key!r}: there are {', '.join(_KEYS)}")
        if not isinstance(value, _KEYS[key]) or not value:
            raise _wrong(path, where, f"{key} is a {_KEYS[key].__name__}, not {value!r}")
    addresses = entry.get("addresses")
    if not addresses or not all(isinstance(one, str) and "@" not in one for one in addresses):
        raise _wrong(path, where, 'addresses = ["HOST[:PORT]", …] is needed; the first that answers is used')
    user = f"{entry['user']}@" if "user" in entry else ""
    identities = (str(Path(entry["identity"]).expanduser()),) if "identity" in entry else ()
    try:
        targets = [ssh.parse(user + one, identities) for one in addresses]
    except KflexError as error:
        raise _wrong(path, where, error.what) from None
    return Target(name, tuple(one.addresses[0] for one in targets), targets[0].user, targets[0].identities)


def _wrong(path: Path, where: str, what: str) -> KflexError:
    return KflexError(what, f"{path}: {where}" if where else str(path), "see docs/remote.md")
