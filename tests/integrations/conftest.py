"""What is in a folder of a framework is collected in its environment only."""

from __future__ import annotations

import os
from pathlib import Path

_HERE = os.environ.get("HYPERPODRUN_TEST_ENVIRONMENT")
collect_ignore = [
    path.parent.name for path in Path(__file__).parent.glob("*/requirements.txt") if path.parent.name != _HERE
]
