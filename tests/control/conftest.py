"""`pytest tests/control --regenerate-scenarios` rewrites the answers in tests/scenarios; review the diff."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--regenerate-scenarios",
        action="store_true",
        help="Write what the job answers now into tests/scenarios/*.txt.",
    )
