"""The worker processes of torch's data loaders, which a fault must not leave behind."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
from typing import Any

from .abort import Abort, AbortState


class AbortDataLoaders(Abort):
    """Kills the worker processes of torch DataLoaders: a busy one would delay the end of its loader by seconds.

    torch is told first to forget them, or its SIGCHLD handler would raise in the main thread, wherever that is.
    A main thread that finishes its pass of the loop may need them: they live until it has.
    """

    def __init__(self) -> None:
        self._put_off = False

    def __call__(self, state: AbortState) -> None:
        self._put_off = state.finishing
        if not state.finishing:
            self._kill_all()

    def again(self, state: AbortState) -> None:
        if self._put_off and not state.finishing:
            self._put_off = False
            self._kill_all()

    def _kill_all(self) -> None:
        loading = sys.modules.get("torch.utils.data.dataloader")
        if loading is None:
            return
        iterator_type = getattr(loading, "_MultiProcessingDataLoaderIter", None)
        if iterator_type is None or not _has_children():
            return
        for candidate in gc.get_objects():
            if type(candidate) is iterator_type:
                self._kill(candidate, loading)

    @staticmethod
    def _kill(iterator: Any, loading: Any) -> None:
        if getattr(iterator, "_worker_pids_set", False):
            iterator._worker_pids_set = False
            with contextlib.suppress(ValueError):
                loading._utils.signal_handling._remove_worker_pids(id(iterator))
        for process in getattr(iterator, "_workers", ()):
            if process.pid is not None and process._popen.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)


def _has_children() -> bool:
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{thread}/children") as file:
            if file.read().strip():
                return True
    return False
