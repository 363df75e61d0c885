"""`offload install` without a redis-server: what it makes of configuration files and service units."""

from __future__ import annotations

from pathlib import Path

import pytest

from kflex_repro.errors import KflexError
from kflex_repro.offload import install, systemd

DATA = Path(__file__).resolve().parent / "data"
MODULE = "/usr/lib/kflex-repro/kflex.so"
LINE = f"loadmodule {MODULE}\n".encode()


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """Stands for a built module."""
    path = tmp_path / "cache" / "kflex.so"
    path.parent.mkdir()
    path.write_bytes(b"\x7fELF of this version")
    return path


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return tmp_path / "lib" / "kflex-repro"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "etc" / "redis.conf"
    path.parent.mkdir()
    path.write_bytes(b"port 6379\nsave 60 1\n")
    return path


def apply(made: install.Plan) -> None:
    install.apply(made, verify=False)


def everything(root: Path) -> dict[str, tuple[bytes, int]]:
    """Names, contents and modes below a directory."""
    return {
        str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mode)
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


# --- the text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"port 6379\n",
        b"port 6379",
        b"port 6379\r\nsave 60 1\r\n",
        b"# loadmodule /opt/kflex.so\n",
        b"loadmodule /opt/other.so a b\n",
        # No continuation lines in redis.conf: this backslash is text.
        b"logfile /tmp/x\\\nport 1\n",
        b"\xff\xfe not utf-8\n",
        b"\n\n\n",
    ],
)
def test_the_line_is_added_and_taken_out(text: bytes) -> None:
    made = install.with_module(text, MODULE)
    assert made.endswith(install.COMMENT + b"\n" + LINE)
    assert made.startswith(text)
    assert install.with_module(made, MODULE) == made
    assert install.without_module(made).rstrip(b"\n") == text.rstrip(b"\n")


@pytest.mark.parametrize(
    ("line", "becomes"),
    [
        (b"loadmodule /opt/kflex.so", b"loadmodule " + MODULE.encode()),
        (
            b"  LoadModule\t'/opt/kflex.so'  drain-us 700",
            b"  LoadModule\t" + MODULE.encode() + b"  drain-us 700",
        ),
        (b'loadmodule "/opt/kflex.so" set-offload no', b"loadmodule " + MODULE.encode() + b" set-offload no"),
    ],
)
def test_a_line_for_another_place_keeps_its_arguments(line: bytes, becomes: bytes) -> None:
    text = b"port 1\n" + line + b"\nsave 1 1\n"
    assert install.with_module(text, MODULE) == b"port 1\n" + becomes + b"\nsave 1 1\n"


def test_a_rewritten_configuration_loses_only_our_line() -> None:
    """CONFIG REWRITE moves the line away from its comment."""
    made = install.with_module(b"port 1\n", MODULE).replace(LINE, b"maxclients 10\n" + LINE + b"user x on\n")
    assert install.without_module(made) == b"port 1\nmaxclients 10\nuser x on\n"


def test_directives_of_included_files(tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "a.conf").write_text("maxclients 1\n")
    (tmp_path / "conf.d" / "b.conf").write_text('LOADMODULE "/x/kflex.so" a\n')
    (tmp_path / "none.d").mkdir()
    main = tmp_path / "redis.conf"
    main.write_text(f"port 1\ninclude conf.d/*.conf\n  # include nowhere\ninclude {tmp_path}/none.d/*.conf\n")
    found = [(each.path.name, each.name, each.args) for each in install.directives(main)]
    assert found == [
        ("redis.conf", "port", ("1",)),
        ("redis.conf", "include", ("conf.d/*.conf",)),
        ("a.conf", "maxclients", ("1",)),
        ("b.conf", "loadmodule", ("/x/kflex.so", "a")),
        ("redis.conf", "include", (f"{tmp_path}/none.d/*.conf",)),
    ]


# --- plans -------------------------------------------------------------------------------------------------


def test_install_and_revert(tmp_path: Path, config: Path, built: Path, prefix: Path) -> None:
    config.chmod(0o640)
    before = everything(tmp_path)
    made = install.plan(config, built, None, prefix)
    assert [(change.path.name, change.kind) for change in made.changes] == [
        ("kflex.so", "create"),
        ("used-by", "create"),
        ("redis.conf.before-kflex", "create"),
        ("redis.conf", "change"),
    ]
    assert everything(tmp_path) == before, "a plan changes nothing"
    apply(made)
    assert (prefix / "kflex.so").read_bytes() == built.read_bytes()
    assert (prefix / "kflex.so").stat().st_mode & 0o777 == 0o755
    assert config.read_bytes().endswith(f"loadmodule {prefix}/kflex.so\n".encode())
    assert config.stat().st_mode & 0o777 == 0o640
    assert install.plan(config, built, None, prefix).is_done
    apply(install.revert_plan(config, None, prefix))
    assert everything(tmp_path) == before
    assert not prefix.exists()
    assert install.revert_plan(config, None, prefix).is_done


@pytest.mark.parametrize("text", [b"", b"port 1", b"loadmodule /opt/kflex.so drain-us 700"])
def test_revert_is_exact(config: Path, built: Path, prefix: Path, text: bytes) -> None:
    config.write_bytes(text)
    apply(install.plan(config, built, None, prefix))
    assert config.read_bytes() != text
    apply(install.revert_plan(config, None, prefix))
    assert config.read_bytes() == text


def test_a_revert_keeps_what_was_written_since(config: Path, built: Path, prefix: Path) -> None:
    apply(install.plan(config, built, None, prefix))
    config.write_bytes(config.read_bytes() + b"maxclients 7\n")
    made = install.revert_plan(config, None, prefix)
    assert any("changed since" in note for note in made.notes)
    apply(made)
    assert config.read_bytes() == b"port 6379\nsave 60 1\nmaxclients 7\n"


def test_another_version_of_the_module(config: Path, built: Path, prefix: Path) -> None:
    """Only the module changes; the original that is kept is the first one."""
    apply(install.plan(config, built, None, prefix))
    built.write_bytes(b"\x7fELF of the next version")
    made = install.plan(config, built, None, prefix)
    assert [change.path.name for change in made.changes if change.kind != "keep"] == ["kflex.so"]
    apply(made)
    apply(install.revert_plan(config, None, prefix))
    assert config.read_bytes() == b"port 6379\nsave 60 1\n"


def test_two_servers_share_the_module(tmp_path: Path, config: Path, built: Path, prefix: Path) -> None:
    other = tmp_path / "etc" / "other.conf"
    other.write_text("port 7000\n")
    for each in (config, other):
        apply(install.plan(each, built, None, prefix))
    first = install.revert_plan(config, None, prefix)
    assert any("stays" in note for note in first.notes)
    apply(first)
    assert (prefix / "kflex.so").exists()
    apply(install.revert_plan(other, None, prefix))
    assert not prefix.exists()


def test_a_symlinked_configuration(tmp_path: Path, config: Path, built: Path, prefix: Path) -> None:
    """The file behind the link changes, the link stays one."""
    link = tmp_path / "redis.conf"
    link.symlink_to(config)
    made = install.plan(link, built, None, prefix)
    assert made.target == config
    apply(made)
    assert link.is_symlink() and b"kflex.so" in config.read_bytes()
    apply(install.revert_plan(link, None, prefix))
    assert link.is_symlink() and config.read_bytes() == b"port 6379\nsave 60 1\n"


def test_the_line_is_in_an_included_file(tmp_path: Path, config: Path, built: Path, prefix: Path) -> None:
    part = tmp_path / "etc" / "modules.conf"
    part.write_text("loadmodule /opt/kflex.so\n")
    config.write_text("include modules.conf\nport 1\n")
    made = install.plan(config, built, None, prefix)
    assert made.target == part
    apply(made)
    assert part.read_text() == f"loadmodule {prefix}/kflex.so\n"
    assert config.read_text() == "include modules.conf\nport 1\n"
    apply(install.revert_plan(config, None, prefix))
    assert part.read_text() == "loadmodule /opt/kflex.so\n"


def test_other_modules_are_named(config: Path, built: Path, prefix: Path) -> None:
    config.write_text("loadmodule /opt/search.so\n")
    assert any("/opt/search.so" in note for note in install.plan(config, built, None, prefix).notes)


def test_what_cannot_be_installed(tmp_path: Path, config: Path, built: Path, prefix: Path) -> None:
    def says(path: Path, where: Path = prefix) -> str:
        with pytest.raises(KflexError) as error:
            install.plan(path, built, None, where)
        return str(error.value)

    assert "no such configuration file" in says(tmp_path / "nowhere.conf")
    assert "a directory" in says(tmp_path)
    assert "absolute path" in says(config, Path("lib"))
    assert "absolute path" in says(config, Path("/opt/with space"))
    config.write_text("loadmodule /a/kflex.so\nloadmodule /b/kflex.so\n")
    assert "more than once" in says(config)
    config.write_text("include nowhere.conf\n")
    assert "no such configuration file" in says(config)
    config.write_text("include redis.conf\n")
    assert "includes itself" in says(config)


def test_a_failure_half_way_leaves_nothing(
    tmp_path: Path, config: Path, built: Path, prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(tmp_path)

    def refuse(_: Path) -> None:
        raise KflexError("redis-server does not start")

    monkeypatch.setattr(install, "try_start", refuse)
    with pytest.raises(KflexError, match="does not start"):
        install.apply(install.plan(config, built, None, prefix))
    assert everything(tmp_path) == before
    assert not prefix.exists()


# --- systemd -----------------------------------------------------------------------------------------------


def unit(text: str, name: str = "redis-server.service") -> systemd.Unit:
    return systemd.Unit(name, tuple(systemd.parse(text)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root directory with Debian 12's unit of redis-server."""
    place = tmp_path / "root" / "lib" / "systemd" / "system"
    place.mkdir(parents=True)
    (place / "redis-server.service").write_text((DATA / "redis-server.service").read_text())
    etc = tmp_path / "root" / "etc" / "systemd" / "system"
    etc.mkdir(parents=True)
    (etc / "redis.service").symlink_to(place / "redis-server.service")
    return tmp_path / "root"


def test_debians_service(root: Path) -> None:
    """It may execute below /usr/lib and nowhere else; bpf() would be its death."""
    debian = systemd.read("redis-server", root)
    settings = [need.setting for need in debian.needs(install.PREFIX)]
    assert settings == ["SystemCallFilter=bpf", "BindPaths=-/sys/fs/bpf/kflex:/run/kflex"]
    assert "ExecPaths=/opt/kflex" in [need.setting for need in debian.needs(Path("/opt/kflex"))]
    for hidden in ("/home/me/lib", "/root/.cache/kflex-repro", "/tmp/lib"):
        with pytest.raises(KflexError, match="cannot see"):
            debian.needs(Path(hidden))
    assert systemd.read("redis.service", root).name == "redis-server.service", "an alias"
    found = systemd.of_config(Path("/etc/redis/redis.conf"), root)
    assert found is not None and found.name == "redis-server.service"
    assert systemd.of_config(Path("/etc/other.conf"), root) is None
    with pytest.raises(KflexError, match="no such service"):
        systemd.read("valkey", root)


def test_our_drop_in_is_enough(root: Path, config: Path, built: Path, prefix: Path) -> None:
    """Installed, read again as systemd would, it leaves nothing to ask for; --revert takes it away."""
    debian = systemd.read("redis-server", root)
    # The service would see the test's directory; its own PrivateTmp hides it.
    settings = tuple(pair for pair in debian.settings if pair[0] != "PrivateTmp")
    service = systemd.Unit(debian.name, settings, root)
    apply(install.plan(config, built, service, prefix))
    added = systemd.parse(service.drop_in.read_text())
    assert ("SystemCallFilter", "bpf") in added and ("ExecPaths", str(prefix)) in added
    complete = systemd.Unit(service.name, (*settings, *added), root)
    assert [need.setting for need in complete.needs(prefix)] == ["BindPaths=-/sys/fs/bpf/kflex:/run/kflex"]
    assert systemd.read("redis-server", root).settings == debian.settings, "ours is not read as the host's"
    apply(install.revert_plan(config, service, prefix))
    assert not service.drop_in.parent.exists()


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("", True),
        ("SystemCallFilter=@system-service", False),
        ("SystemCallFilter=@system-service bpf", True),
        ("SystemCallFilter=@system-service @privileged", True),
        ("SystemCallFilter=@known", True),
        ("SystemCallFilter=@known\nSystemCallFilter=~@privileged:EPERM", False),
        ("SystemCallFilter=~@privileged", False),
        ("SystemCallFilter=~@mount", True),
        ("SystemCallFilter=~bpf\nSystemCallFilter=bpf", True),
        ("SystemCallFilter=@system-service\nSystemCallFilter=", True),
    ],
)
def test_system_call_filters(text: str, allowed: bool) -> None:
    needs = [need.setting for need in unit(f"[Service]\n{text}\n").needs(install.PREFIX)]
    assert ("SystemCallFilter=bpf" not in needs) == allowed


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX", True),
        ("RestrictAddressFamilies=AF_INET AF_INET6", False),
        ("RestrictAddressFamilies=~AF_PACKET", True),
        ("RestrictAddressFamilies=~AF_UNIX", False),
    ],
)
def test_address_families(text: str, allowed: bool) -> None:
    needs = [need.setting for need in unit(f"[Service]\n{text}\n").needs(install.PREFIX)]
    assert ("RestrictAddressFamilies=AF_UNIX" not in needs) == allowed


def test_units_with_drop_ins_templates_and_long_lines(root: Path) -> None:
    """The last assignment counts, an empty one starts anew, an instance has its template's settings."""
    place = root / "etc" / "systemd" / "system"
    (place / "redis-server@.service").write_text(
        "[Unit]\nNoExecPaths=/nowhere\n[Service]\nExecStart=/usr/bin/redis-server \\\n  /etc/redis/%i.conf\n"
        "# a comment\nUser=redis\nNoExecPaths=/\nExecPaths=/usr/bin\n"
    )
    for name, part, text in (
        ("redis-server@.service.d", "all", "[Service]\nUser=\nUser=root\n"),
        (
            "redis-server@two.service.d",
            "two",
            "[Service]\nExecPaths=\nExecPaths=/usr/lib\nPrivateNetwork=yes\n",
        ),
    ):
        (place / name).mkdir()
        (place / name / f"{part}.conf").write_text(text)
    one, two = systemd.read("redis-server@one", root), systemd.read("redis-server@two.service", root)
    assert one.last("User") == two.last("User") == "root"
    assert [need.setting for need in one.needs(install.PREFIX)] == [f"ExecPaths={install.PREFIX}"]
    assert two.needs(install.PREFIX) == []
    assert any("--pid" in note for note in two.notes())
    assert two.drop_in == place / "redis-server@two.service.d" / "kflex.conf"


def test_a_service_with_another_root() -> None:
    with pytest.raises(KflexError, match="a root of its own"):
        unit("[Service]\nRootDirectory=/srv/redis\n").needs(install.PREFIX)
