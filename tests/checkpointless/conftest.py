"""Whole jobs that are compared bit for bit, as `scripts/bench exactness` runs them: two at the same time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from exactness import Ended, Plan, launch


@pytest.fixture(scope="module")
def ended(request: pytest.FixtureRequest) -> Iterator[Callable[[Plan], Ended]]:
    """ended(plan): the end of that run. Those of the module's tests with a parameter `wanted` are begun beforehand."""
    with ThreadPoolExecutor(2) as pool:
        runs: dict[Plan, Future[Ended]] = {}

        def run(plan: Plan) -> Future[Ended]:
            if plan not in runs:
                runs[plan] = pool.submit(launch, plan)
            return runs[plan]

        for item in request.session.items:
            if item.path == request.path and "wanted" in getattr(item, "fixturenames", ()):
                wanted = item.callspec.params["wanted"]
                run(wanted.undisturbed), run(wanted)
        yield lambda plan: run(plan).result()
