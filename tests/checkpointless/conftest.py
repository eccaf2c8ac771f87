"""Whole jobs that are compared bit for bit, as `scripts/bench exactness` runs them: two at the same time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from exactness import Runs


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[Runs]:
    """Those of the module's tests with a parameter `wanted` are begun beforehand."""
    with Runs(at_once=2) as runs:
        for item in request.session.items:
            if item.path == request.path and "wanted" in getattr(item, "fixturenames", ()):
                runs.begin(item.callspec.params["wanted"])
        yield runs
