"""Every test has a cache directory and a loader name of its own; the host of producers is this process's, for all."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hyperpodrun import CacheResumeMMAPConfig, MMAPDataLoader

_numbers = itertools.count()

Loading = Callable[..., MMAPDataLoader]


@pytest.fixture
def load(tmp_path: Any) -> Iterator[Loading]:
    """load(factory, name=..., seed=..., **config): a loader that is closed after the test."""
    opened: list[MMAPDataLoader] = []
    test = f"t{next(_numbers)}"

    def make(
        factory: Any, name: str = "train", seed: int | None = None, rank: Any = None, **config: Any
    ) -> MMAPDataLoader:
        config.setdefault("cache_dir", str(tmp_path / "cache"))
        config.setdefault("start_timeout", 60.0)
        config.setdefault("batch_timeout", 30.0)
        loader = MMAPDataLoader(
            factory, CacheResumeMMAPConfig(**config), name=f"{test}-{name}", seed=seed, data_rank=rank
        )
        opened.append(loader)
        return loader

    yield make
    for loader in opened:
        loader.close()
