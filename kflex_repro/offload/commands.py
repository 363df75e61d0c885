"""The allow-list of commands (commands.toml) as the kernel's programs want it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib.resources import files


def read() -> Mapping[str, object]:
    """The parsed commands.toml."""
    return tomllib.loads(files(__package__).joinpath("commands.toml").read_text())


def _words(value: object) -> list[str]:
    assert isinstance(value, str)
    return value.upper().split()


def flags(bits: Mapping[str, int]) -> dict[str, int]:
    """Upper-case command, or ``CONTAINER|SUB`` -> enum kflex_cmd_flag bits; ``bits`` is that enum."""
    data = read()
    found: dict[str, int] = dict.fromkeys(_words(data["one_reply"]), bits["KFLEX_CMD_OK"])
    for command in ("GET", "SET"):
        found[command] |= bits["KFLEX_CMD_TABLE"]
    for key, name in (("multi", "MULTI"), ("end", "END"), ("auth", "AUTH"), ("zero", "ZERO")):
        for command in _words(data[key]):
            found[command] = bits["KFLEX_CMD_OK"] | bits[f"KFLEX_CMD_{name}"]
    containers = data["containers"]
    assert isinstance(containers, dict)
    for container, subcommands in containers.items():
        found[container.upper()] = bits["KFLEX_CMD_OK"] | bits["KFLEX_CMD_SUB"]
        for sub in _words(subcommands):
            found[f"{container.upper()}|{sub}"] = bits["KFLEX_CMD_OK"]
    for command in _words(data["secret"]):
        found[command] |= bits["KFLEX_CMD_SECRET"]
    return found


def demoting() -> set[str]:
    """Commands that were looked at and left out."""
    reasons = read()["demote"]
    assert isinstance(reasons, dict)
    return {command for words in reasons.values() for command in _words(words)}
