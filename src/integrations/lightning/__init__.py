"""Lightning's trainer under hyperpodrun.

- `recoverable`, `CheckpointlessDDPStrategy`, `CheckpointlessModelParallelStrategy`: what a script uses.
- `strategy`: the mixin, where state is registered and restored; `recover`: the decorator; `entry`: what the ranks know
  before that.
- `steps`: where a step ends in Lightning's loops, and the way back there; `position`, `results`, `loggers`, `files`,
  `plain`: what is noted of the trainer, and put back.
- `data`: `MMAPDataModule`, a data module whose batches are cached.

Names are imported on first use: the mixin and the decorator need no Lightning, the rest says what to install.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "CheckpointlessDDPStrategy": ".strategies",
    "CheckpointlessModelParallelStrategy": ".strategies",
    "CheckpointlessStrategy": ".strategy",
    "MMAPDataModule": ".data",
    "recoverable": ".recover",
}

if TYPE_CHECKING:
    from .data import MMAPDataModule
    from .recover import recoverable
    from .strategies import CheckpointlessDDPStrategy, CheckpointlessModelParallelStrategy
    from .strategy import CheckpointlessStrategy

__all__ = [
    "CheckpointlessDDPStrategy",
    "CheckpointlessModelParallelStrategy",
    "CheckpointlessStrategy",
    "MMAPDataModule",
    "recoverable",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name], __name__), name)
