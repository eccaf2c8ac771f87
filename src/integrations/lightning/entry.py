"""What the ranks know of the job before anything is restored, and tell a rank that is new."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

from torch import distributed as dist

from ...checkpointless.errors import UnsupportedStateError
from ...checkpointless.manager import CheckpointManager
from .loggers import put_aside, set_versions, versions_of


@dataclass
class Known:
    """Of one call of the function. `entry`: which entry of it has been told."""

    versions: list[Any]
    began: float
    call: int = 0
    entry: Any = None

    def told(self) -> dict[str, Any]:
        """What other ranks hear of it."""
        return {"versions": self.versions, "began": self.began}


def agree(trainer: Any, mine: Known | None, manager: CheckpointManager) -> Known:
    """All ranks, when their process group is up: the first one that knows tells; where nobody does, the first rank says
    what is to be."""
    call, entry = manager.entry
    if mine is not None and mine.call != call:
        mine = None
    if mine is not None and mine.entry is entry:
        raise UnsupportedStateError(
            "fit() is called for the second time in one entry of the function: give each a function of its own, "
            "recoverable on its own"
        )
    known = _first(None if mine is None else mine.told())
    if known is None:
        known = _first(Known(versions_of(trainer), time.time()).told() if trainer.is_global_zero else None)
        assert known is not None
        set_versions(trainer, known["versions"])
    else:
        set_versions(trainer, known["versions"])
        if trainer.is_global_zero:
            put_aside(trainer)
    return Known(known["versions"], known["began"], call, entry)


def _first(value: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the first rank that has something has."""
    if not dist.is_initialized():
        return value
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, None if value is None else json.dumps(value))
    return next((json.loads(text) for text in told if text is not None), None)
