"""What one launch was asked to be: the one object that travels from the command line inward."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class OutputMap:
    """Which of a worker's streams go somewhere: bit 1 stdout, bit 2 stderr, by local rank."""

    default: int = 0
    by_rank: Mapping[int, int] = field(default_factory=dict)

    def streams(self, local_rank: int) -> int:
        return self.by_rank.get(local_rank, self.default if not self.by_rank else 0)


@dataclass(frozen=True)
class LaunchConfig:
    """One launch. Times in seconds."""

    command: tuple[str, ...]
    """The whole worker command, interpreter included."""
    nproc_per_node: int = 1
    run_id: str = "none"
    role: str = "default"
    max_restarts: int = 0
    inprocess_restart: bool = False
    inprocess_timeout: float | None = None
    """Limit for a worker to reach the barrier; None: DEFAULT_BARRIER_TIMEOUT, and longer at the first start."""
    max_inprocess_restarts: int | None = None
    start_method: str = "standby"
    """`spawn`: every worker is started cold. Anything else: forked from a standby source where that can be done."""
    preload: tuple[str, ...] = ()
    """Modules that the standby source imports as well."""
    no_python: bool = False
    shutdown_signal: int = signal.SIGTERM
    shutdown_timeout: float = 30.0
    pre_train: tuple[str, ...] = ()
    post_train: tuple[str, ...] = ()
    log_dir: Path | None = None
    redirects: OutputMap = OutputMap()
    tee: OutputMap = OutputMap()


DEFAULT_BARRIER_TIMEOUT = 60.0
DEFAULT_START_TIMEOUT = 600.0
"""A first start may index a data set on one rank while the others wait; a recovery does not."""
