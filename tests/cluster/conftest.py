"""Nodes for a test: network namespaces. tests/conftest.py leaves these tests out where there can be none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster_jobs import Job
from namespaces import Namespaces


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """cluster(nodes, *options): namespaces for a job."""
    made: list[Namespaces] = []

    def make(nodes: int, *options: str) -> Job:
        made.append(Namespaces(nodes))
        directory = tmp_path / f"job-{len(made)}"
        directory.mkdir()
        job = Job(made[-1], directory)
        job.options = list(options)
        return job

    yield make
    for namespaces in made:
        namespaces.close()


TIMES = pytest.StashKey[list[str]]()


@pytest.fixture
def recovery_times(request: pytest.FixtureRequest) -> Callable[[Job, str, float, set[int]], None]:
    """recovery_times(job, case, seconds, survivors): told at the end of the run, asserted never.

    `seconds` from the fault until every survivor has completed a step. Most of it is the wait for the new processes:
    they are forked from a warm standby, and begin with the script's first line.
    """
    lines = request.config.stash.setdefault(TIMES, [])

    def note(job: Job, case: str, seconds: float, survivors: set[int]) -> None:
        phases = [row["phases_ms"] for node in survivors for row in job.recoveries(node)[:1]]
        waited = max(((phase["start"] or 0.0) + (phase["barrier"] or 0.0)) / 1000 for phase in phases)
        lines.append(f"{case:32} {seconds:6.2f} s, of which {waited:5.2f} s for new processes")

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash.get(TIMES, [])
    if lines:
        terminalreporter.section("recovery of 3 nodes of 2 workers and a spare, from the fault to the next step")
        for line in lines:
            terminalreporter.write_line(line)
