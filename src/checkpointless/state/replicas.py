"""Replica groups: which ranks hold the same bytes. Each rank names its shard; the same name means the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch

from ...protocol.plan import MAX_SHARD_NAME
from .provider import StateProvider

Replicas: TypeAlias = Callable[[int], object]
"""A user's own rule: ranks for which it gives the same value hold the same bytes."""


def shard_name(rank: int, state: StateProvider, replicas: Replicas | None) -> str:
    """The name of this rank's shard: by the user's rule, or as the state itself says. Raises ValueError."""
    name = state.shard() if replicas is None else str(replicas(rank))
    if len(name) > MAX_SHARD_NAME:
        source = f"replicas({rank})" if replicas is not None else "the name of this rank's shard"
        raise ValueError(f"{source} is {len(name)} characters long: give CheckpointManager(replicas=...) a short one")
    return name


def shard_of(parameters: Mapping[str, torch.Tensor], optimizers: Mapping[str, torch.optim.Optimizer]) -> str:
    """The shard of plain PyTorch's state, read off it.

    DDP: one shard, everybody holds it. FSDP2: the coordinates on the mesh dimensions over which parameters are
    sharded; the others are replicas (HSDP). ZeroRedundancyOptimizer: the rank within its process group.
    """
    parts: set[str] = set().union(*map(_coordinates, parameters.values()))
    for name, optimizer in optimizers.items():
        if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
            group = optimizer.process_group  # type: ignore[attr-defined]
            parts.add(f"{name}:{torch.distributed.get_rank(group)}")
    return ",".join(sorted(parts))


def group_of(parameter: torch.Tensor) -> str:
    """The replica group of one parameter: its coordinates on the mesh dimensions over which it is sharded."""
    return ",".join(sorted(_coordinates(parameter)))


def _coordinates(parameter: Any) -> set[str]:
    """Empty for a parameter that is not spread over ranks (no DTensor)."""
    if not (hasattr(parameter, "device_mesh") and hasattr(parameter, "placements")):
        return set()
    mesh = parameter.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError("this rank is not in the device mesh of its own parameters")
    names = mesh.mesh_dim_names or tuple(range(mesh.ndim))
    return {
        f"{name}={coordinate[dimension]}"
        for dimension, (name, placement) in enumerate(zip(names, parameter.placements, strict=True))
        if not placement.is_replicate()
    }
