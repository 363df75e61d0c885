"""``python -m kflex_repro``."""

import sys

from kflex_repro.cli import main

sys.exit(main())
