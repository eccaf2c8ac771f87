"""Nodes for a test: network namespaces, or a reason why there are none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster_jobs import Job
from namespaces import Namespaces, why_not

REASON = why_not()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """cluster(nodes, *options): namespaces for a job."""
    if REASON is not None:
        pytest.skip(REASON)
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
