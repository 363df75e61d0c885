"""What runs in the guest: doctor's facts, then tests of the modules named, the results of both to $KFLEX_OUT.

``python -m tests.vm.inside MARKERS FILE…``, MARKERS as pytest's -m; the exit status is pytest's.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from kflex_repro import host
from tests.vm.smoke import FACTS, FEATURES, RESULTS


def main(markers: str, files: list[str]) -> int:
    out = Path(os.environ["KFLEX_OUT"])
    facts = [asdict(host.fact(key)) for key in FEATURES]
    (out / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    options = ["-p", "no:cacheprovider", "-m", markers, "-v", "--tb=short", "--durations=5"]
    return pytest.main([*options, "-o", "junit_family=xunit1", f"--junitxml={out / RESULTS}", *files])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
