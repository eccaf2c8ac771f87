"""The strategies of the Lightning that is used, `lightning.pytorch` or `pytorch_lightning`, made checkpointless."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from .strategy import CheckpointlessStrategy

_NAMES = ("lightning.pytorch", "pytorch_lightning")


def _strategies() -> Any:
    """Of the one that the script has imported; else of one that can be."""
    for name in sorted(_NAMES, key=lambda name: sys.modules.get(name) is None):
        try:
            importlib.import_module(name)
            return importlib.import_module(f"{name}.strategies")
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise
    raise ModuleNotFoundError("Lightning is not installed: pip install 'hyperpodrun[lightning]'", name="lightning")


_found = _strategies()


class CheckpointlessDDPStrategy(CheckpointlessStrategy, _found.DDPStrategy):  # type: ignore[misc,name-defined]
    """`DDPStrategy` that recovers without checkpoints. Takes its arguments, and `manager`."""


class CheckpointlessModelParallelStrategy(CheckpointlessStrategy, _found.ModelParallelStrategy):  # type: ignore[misc,name-defined]
    """`ModelParallelStrategy` (FSDP2) that recovers without checkpoints. Takes its arguments, and `manager`.

    Replicas are read off the parameters: what `configure_model` shards over all ranks is held once only, and a lost
    rank needs `snapshot_every` or `disk_path`; with a mesh that replicates over one dimension (HSDP) it has a replica.
    """
