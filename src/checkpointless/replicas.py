"""Replica groups: which ranks hold the same bytes. Each rank names its shard; the same name means the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch

from ..protocol.plan import MAX_SHARD_NAME
from .tensors import sharded

Replicas: TypeAlias = Callable[[int], object]
"""A user's own rule: ranks for which it gives the same value hold the same bytes."""


def shard_name(
    rank: int,
    parameters: Mapping[str, torch.Tensor],
    optimizers: Mapping[str, torch.optim.Optimizer],
    replicas: Replicas | None,
) -> str:
    """The name of this rank's shard. Without a rule it is read off the parameters and optimizers.

    DDP: one shard, everybody holds it. FSDP2: the coordinates on the mesh dimensions over which parameters are
    sharded; the others are replicas (HSDP). ZeroRedundancyOptimizer: the rank within its process group.
    """
    if replicas is not None:
        name = str(replicas(rank))
        if len(name) > MAX_SHARD_NAME:
            raise ValueError(f"replicas({rank}) is {len(name)} characters long: give a short name or a number")
        return name
    parts: set[str] = set()
    for parameter in sharded(parameters):
        parts |= _coordinates(parameter)
    for name, optimizer in optimizers.items():
        if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
            group = optimizer.process_group  # type: ignore[attr-defined]
            parts.add(f"{name}:{torch.distributed.get_rank(group)}")
    return ",".join(sorted(parts))


def _coordinates(parameter: Any) -> set[str]:
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
