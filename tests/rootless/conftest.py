"""A store and two ranks for the tests of the node-local store."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rank_process import RankProcess
from store_process import StoreProcess


@pytest.fixture
def store() -> Iterator[StoreProcess]:
    """A store at epoch 0."""
    with StoreProcess() as process:
        yield process


@pytest.fixture(scope="session")
def ranks() -> Iterator[tuple[RankProcess, RankProcess]]:
    """Two processes with torch, shared by all tests: each test connects anew."""
    with RankProcess() as first, RankProcess() as second:
        yield first, second


@pytest.fixture
def rank(ranks: tuple[RankProcess, RankProcess]) -> RankProcess:
    """One process with torch."""
    return ranks[0]
