"""All that torch.distributed has of an epoch: its communicators are broken, its groups forgotten."""

from __future__ import annotations

import sys
from typing import Any

from .abort import Abort, Compose
from .data_loaders import AbortDataLoaders
from .gloo import AbortGloo
from .nccl import AbortNccl
from .unknown import AbortUnknown


class AbortTorchDistributed(Compose):
    """All communicators of torch.distributed: NCCL, gloo, and those that are not known."""

    def __init__(self) -> None:
        super().__init__(AbortUnknown(), AbortGloo(), AbortNccl())


def default_abort() -> Abort:
    """What HPWrapper uses when it is given nothing: communicators first, then data loaders."""
    return Compose(AbortDataLoaders(), AbortTorchDistributed())


def release_process_groups() -> list[Any]:
    """Makes torch.distributed forget every group, on the main thread; gives what is left of them.

    Not by `destroy_process_group()`: that shuts every group down first, and an NCCL group whose communicator was just
    aborted can keep it waiting for ever. Whoever drops the result waits for the groups' destructors, which takes gloo
    about 10 ms for each rank: do that on another thread, they release the GIL.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available():
        return []
    c10d = distributed.distributed_c10d
    world = c10d._world
    remains: list[Any] = [*world.pg_map.keys(), *world.pg_map.values()]
    c10d._update_default_pg(None)
    for name in ("pg_map", "pg_names", "pg_group_ranks", "pg_backend_config", "pg_to_tag", "tags_to_pg"):
        getattr(world, name).clear()
    world.pg_coalesce_state.clear()
    c10d._unregister_all_process_groups()
    # The count is part of the next group's name and of its keys in the store, so it must be the same on all ranks; one
    # that was interrupted inside `init_process_group` has counted its group already, one that had not begun has not.
    world.group_count = 0
    return remains
