"""How a loader is to be cached. HyperPod's names and meaning, and a few of our own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DEFAULT_CACHE_DIR = "/dev/shm/pdl_cache"


@dataclass(frozen=True, kw_only=True)
class CacheResumeMMAPConfig:
    """Batches are prepared in memory-mapped files and are still there after a restart.

    `cache_dir`: where they lie; a directory on tmpfs costs memory, one on a disk costs no more than the page cache.
    `prefetch_length`, `val_prefetch_length`: batches prepared ahead of the slowest reader (the second: for the
    validation, test and prediction loaders of an MMAPDataModule).
    `lookback_length`: batches kept behind it, for a restart that has to go back by a few.
    `checkpoint_frequency`: batches between two checkpoints. The first `lookback_length` batches after the last
    checkpoint are then kept too, so that a restart from it finds its first batches ready. None: not kept.
    `model_parallel_group`: a process group whose ranks share data-parallel ranks, Megatron's model-parallel group. On a
    node that has just replaced another one, its cache cold, ranks then get their first batches from a rank of another
    node that reads the same stream, while their own producer starts. Every rank of the group must make and iterate its
    loaders in the same order. None: every node waits for its own producer.
    `enable_batch_encryption`: AES-256-GCM with a key that is only in the memory of the producer and its readers.

    Ours: `max_skip_batches`: how many batches may be made and thrown away to reach a position that nothing else leads
    to. `start_timeout`, `batch_timeout` in seconds: how long the producer may take to start (it opens the
    user's dataset) and to make the batch that the reader waits for.
    """

    cache_dir: str = DEFAULT_CACHE_DIR
    prefetch_length: int = 10
    val_prefetch_length: int = 10
    lookback_length: int = 2
    checkpoint_frequency: int | None = None
    model_parallel_group: Any = None
    enable_batch_encryption: bool = False
    max_skip_batches: int = 100_000
    start_timeout: float = 1800.0
    batch_timeout: float = 1800.0

    def __post_init__(self) -> None:
        for name, least in (
            ("prefetch_length", 1),
            ("val_prefetch_length", 1),
            ("lookback_length", 0),
            ("max_skip_batches", 0),
            ("checkpoint_frequency", 1),
        ):
            value = getattr(self, name)
            if value is None and name == "checkpoint_frequency":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number from {least} on, not {value!r}")
        for name in ("start_timeout", "batch_timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be a positive number of seconds, not {getattr(self, name)!r}")
        if not self.cache_dir:
            raise ValueError("cache_dir must name a directory")


@dataclass(frozen=True, kw_only=True)
class PassthroughMMAPConfig:
    """No cache: the loader runs in the training process, in the order and with the resume positions of a cached one."""


MMAPConfig = CacheResumeMMAPConfig | PassthroughMMAPConfig
