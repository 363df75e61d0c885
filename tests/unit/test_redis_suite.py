"""The harness around Redis's own tests: where they come from, their output, when two runs differ."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest

from kflex_repro.build import redis_source
from kflex_repro.errors import Unavailable
from tests.redis_suite.attacher import Count
from tests.redis_suite.compare import Comparison, explanations
from tests.redis_suite.run import WHOLE, Outcome, parse

POLICY = """redis-server:
  Installed: 5:7.0.15-1~deb12u10
  Candidate: 5:7.0.15-1~deb12u10
  Version table:
 *** 5:7.0.15-1~deb12u10 500
        500 http://security.example/debian bookworm-security/main amd64 Packages
        100 /var/lib/dpkg/status
     5:7.0.15-1~deb12u7 500
        500 http://mirror.example/debian bookworm/main amd64 Packages
"""

OUTPUT = """Starting test server at port 21079
[\x1b[0;32mok\x1b[0m]: SET and GET an item (1 ms)
[ok]: a name (with brackets) (12 ms)
[ok]: a name (with brackets) (13 ms)
[\x1b[0;31merr\x1b[0m]: One that fails in tests/unit/other.tcl
Expected 'a' to equal or match 'b'
[skip]: not asked for
[ignore]: large: large memory flag not provided
[1/1 \x1b[0;33mdone\x1b[0m]: unit/other (6 seconds)
"""


def test_the_source_comes_from_where_redis_came_from() -> None:
    assert redis_source.deb_src_lines(POLICY) == [
        "http://security.example/debian bookworm-security main",
        "http://mirror.example/debian bookworm main",
    ]
    assert redis_source.deb_src_lines("redis-server:\n  Installed: (none)\n") == []


def test_the_version_is_the_installed_one_or_a_later_update_of_it() -> None:
    offered = ["5:7.0.15-1~deb12u7", "5:7.0.15-1~deb12u10", "5:7.0.15-1~deb12u9"]
    assert redis_source.choose("5:7.0.15-1~deb12u9", offered) == "5:7.0.15-1~deb12u9"
    assert redis_source.choose("5:7.0.15-1~deb12u8", offered) == "5:7.0.15-1~deb12u10"
    with pytest.raises(Unavailable, match=r"no archive has the source of redis 5:7\.2\.4-1"):
        redis_source.choose("5:7.2.4-1", offered)


def test_a_damaged_copy_is_fetched_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fetched = []

    def fetch(out: Path, name: str, version: str) -> None:
        fetched.append(version)
        (out / "runtest").write_text("#!/bin/sh\n")

    monkeypatch.setenv("KFLEX_CACHE", str(tmp_path))
    monkeypatch.setattr(redis_source, "installed_version", lambda: ("redis", "5:7.0.15-1"))
    monkeypatch.setattr(redis_source, "_fetch", fetch)
    monkeypatch.setattr(redis_source.shutil, "which", lambda _name: "/usr/bin/there")
    place = redis_source.ensure()
    assert redis_source.ensure() == place
    assert len(fetched) == 1
    (place / "runtest").write_text("damaged")
    assert (redis_source.ensure() / "runtest").read_text() == "#!/bin/sh\n"
    assert len(fetched) == 2


def outcome(offloaded: bool, count: Count | None = None, **tests: str) -> Outcome:
    ends = {name: collections.Counter([end]) for name, end in tests.items()}
    return Outcome("unit/other", "served", offloaded, ends, count=count or Count())


def test_what_the_suite_prints() -> None:
    found = Outcome("unit/other", "served", True)
    parse(OUTPUT, found)
    assert found.total("ok") == 3
    assert found.tests["a name (with brackets)"]["ok"] == 2
    assert found.failed == {"One that fails"}
    assert "Expected 'a'" in found.details["One that fails"]
    assert (found.total("skip"), found.total("ignore")) == (1, 1)


def test_a_crash_of_the_suite_is_a_failure() -> None:
    found = Outcome("unit/other", "served", True)
    parse("[exception]: Executing test client: I/O error reading reply.\n  while executing\n", found)
    assert found.failed == {"the file as a whole"}


def test_only_what_fails_offloaded_alone_is_a_difference() -> None:
    plain, offload = outcome(False, a="ok", b="err", c="ok"), outcome(True, a="ok", b="err", c="err")
    found = Comparison("unit/other", "served", [plain], [offload])
    assert found.different == ["c"]
    assert found.broken == {"b"}
    assert len(found.problems({})) == 1
    assert found.problems({("unit/other", "c"): "because"}) == []
    # It fails without the offload too, only not always.
    found.plain.append(outcome(False, a="ok", b="err", c="err"))
    assert found.different == []


def test_a_file_that_runs_on_neither_side_is_a_problem() -> None:
    plain, offload = outcome(False, **{WHOLE: "exception"}), outcome(True, **{WHOLE: "exception"})
    found = Comparison("unit/other", "served", [plain], [offload])
    assert found.different == []
    assert "did not run" in found.problems({})[0]


def test_a_test_that_only_one_side_has_run_is_a_difference() -> None:
    plain, offload = outcome(False, a="ok", b="ok"), outcome(True, a="ok")
    assert Comparison("unit/other", "served", [plain], [offload]).different == ["b"]


def test_a_broken_promise_is_a_problem_even_if_all_tests_pass() -> None:
    count = Count()
    count.requests["open_commands"] = 1
    found = Comparison("unit/other", "served", [outcome(False, a="ok")], [outcome(True, count, a="ok")])
    assert found.different == []
    assert "open_commands" in found.problems({})[0]


def test_the_explanations_say_why() -> None:
    for (file, test), why in explanations().items():
        assert file.startswith(("unit/", "integration/")), file
        assert test, file
        assert len(why) > 20, (file, test)
