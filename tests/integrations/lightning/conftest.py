"""`--seeds N`: so many random faults for each kind of training.

export HYPERPODRUN_TEST_ENVIRONMENT=lightning
$(scripts/environment lightning) -m pytest tests/integrations/lightning --seeds 10
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seeds", type=int, default=2, help="random faults for each kind of training")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(metafunc.config.getoption("--seeds")))
