"""The directories of a job on this node: one for sockets, one for state, in memory where that can be.

What earlier jobs left here, killed together with their keepers, is removed. Called by: `local.py`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from ..directories import Owned, in_memory, make_owned, remove_orphaned, temporary, temporary_for_sockets
from ..output.console import Console
from ..output.disk import Disk, DiskHangs

_RUNTIME, _STATE = "hyperpodrun-", "hyperpodrun-state-"
"""How they are named."""
_LIMIT_S = 10.0
_T = TypeVar("_T")


class JobDirectories:
    """Of one job. `token` is what they are known by."""

    def __init__(self, token: str, console: Console) -> None:
        self._token = token
        self._console = console
        self.made: list[Owned] = []

    def make_runtime(self) -> Path:
        """For sockets. Raises OSError."""
        return self._add(_bounded(lambda: make_owned(temporary_for_sockets(), _RUNTIME, self._token)))

    def make_state(self) -> Path | None:
        """In memory, or where temporary files go, or nowhere: state then moves from process to process only."""
        reason = ""
        for parent in dict.fromkeys((in_memory(), temporary())):
            try:
                directory = _bounded(partial(make_owned, parent, _STATE, self._token))
            except OSError as error:
                reason = f"{parent}: {error.strerror or error}"
                continue
            if reason:
                self._console.log("state-directory", path=directory.path, instead_of=reason)
            return self._add(directory)
        self._console.log("state-directory-off", reason=reason, action="no snapshots are kept on this node")
        return None

    def remove(self) -> None:
        for directory in self.made:
            with contextlib.suppress(DiskHangs):
                _bounded(directory.remove)

    def begin_removing_orphaned(self) -> None:
        """What jobs left here. On a thread: a directory can be large, or hang."""
        threading.Thread(target=self._remove_orphaned, name="hyperpodrun-orphans", daemon=True).start()

    def _remove_orphaned(self) -> None:
        places = (in_memory(), temporary(), temporary_for_sockets())
        for path in remove_orphaned(iter(places), (_RUNTIME, _STATE)):
            self._console.log("orphan-removed", path=path, reason="its job was killed together with its keeper")

    def _add(self, directory: Owned) -> Path:
        self.made.append(directory)
        return directory.path


def _bounded(action: Callable[[], _T]) -> _T:
    """An operation on a directory of the job's own. Raises DiskHangs: temporary files, too, can be on a network."""
    return Disk().call(action, _LIMIT_S)
