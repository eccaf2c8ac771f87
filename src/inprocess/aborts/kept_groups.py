"""Process groups outlive the DDP modules that use them: otherwise a process can wait for itself for ever.

A DDP module holds its group from C++, and destroys it, if it is the last to hold it, with the interpreter's lock taken.
The destructor of a gloo group waits for the group's threads, and one of these may want that lock, to destroy the work
of the last collective: seen in one of a hundred functions that ended by `destroy_process_group()` on a busy machine. A
group that Python holds, too, is destroyed without the lock (torch 2.6 to 2.13). So every group is held here from its
making on, and given up when others are made, or at the next entry: long after its threads have come to rest.
"""

from __future__ import annotations

import sys
from typing import Any


class _Watched(dict[Any, Any]):
    """torch's dictionary of the groups that there are; what was in it is remembered."""

    def __init__(self, groups: dict[Any, Any], kept: KeptGroups) -> None:
        super().__init__(groups)
        self._kept = kept

    def __setitem__(self, group: Any, value: Any) -> None:
        self._kept.made(group)
        super().__setitem__(group, value)


class KeptGroups:
    """Every process group that was made in this process and not yet given up. To be used on the main thread."""

    def __init__(self) -> None:
        self._groups: list[Any] = []
        self._world: Any = None

    def install(self) -> None:
        """Sees all groups that are made from now on, and those that there are."""
        distributed = sys.modules.get("torch.distributed")
        if distributed is None or not distributed.is_available() or self._world is not None:
            return
        c10d = distributed.distributed_c10d
        if type(getattr(c10d, "_pg_map", None)) is not dict:
            return  # of a torch that keeps its groups elsewhere
        self._groups += c10d._pg_map
        c10d._pg_map = _Watched(c10d._pg_map, self)
        self._world = c10d._world

    def made(self, group: Any) -> None:
        """A group is new. Those that are no longer torch's have been given up by the script."""
        self.take_destroyed()
        self._groups.append(group)

    def take_destroyed(self) -> list[Any]:
        """Those that torch has forgotten; they are not held here any more."""
        destroyed = [group for group in self._groups if group not in self._world.pg_map]
        self._groups = [group for group in self._groups if group in self._world.pg_map]
        return destroyed
