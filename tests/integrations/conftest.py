"""What is in a folder of a framework is collected in its environment only.

    export HYPERPODRUN_TEST_ENVIRONMENT=hf
    $(scripts/environment hf) -m pytest tests/integrations/hf --seeds 2

A test that takes a `seed` draws its faults from it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_HERE = os.environ.get("HYPERPODRUN_TEST_ENVIRONMENT")
collect_ignore = [
    path.parent.name for path in Path(__file__).parent.glob("*/requirements.txt") if path.parent.name != _HERE
]


def pytest_addoption(parser: pytest.Parser) -> None:
    default = int(os.environ.get("HYPERPODRUN_TEST_SEEDS", "10"))
    parser.addoption("--seeds", type=int, default=default, help="random faults of each kind; 2 are a quick run")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(metafunc.config.getoption("seeds")))
