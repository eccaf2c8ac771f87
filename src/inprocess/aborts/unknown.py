"""Backends of torch.distributed that this package does not know: said once, aborted as torch can, never waited for.

What breaks a wait in gloo and in NCCL is known, measured and tested. Of another backend (XCCL, UCC, MPI, one that a
library registers, or a known one under a new name) only torch's own `abort()` is there to be tried. A main thread that
does not come back from it is given up, and the agent puts a new process in this one's place.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

from ..log import log
from .abort import Abort, AbortState
from .nccl import is_nccl

PATIENCE_S = 10.0
"""From the abort to the end of a process whose main thread may be stuck in a backend that is not known."""
_KNOWN = ("gloo", "fake", "undefined")

_said: set[str] = set()


class AbortUnknown(Abort):
    """`abort()` of every backend that is not known, each on a thread that nobody waits for."""

    def __call__(self, state: AbortState) -> None:
        tell_unknown()
        for name, backend in _unknown():
            if hasattr(backend, "abort"):
                threading.Thread(target=_abort, args=(name, backend), name="hyperpodrun-abort", daemon=True).start()


def tell_unknown() -> None:
    """One line for each backend in use that is not known, from the first process of the node."""
    for name in unknown_names() - _said:
        _said.add(name)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            action = f"at a fault its abort() is tried, and a process that hangs in it for {PATIENCE_S:g} s is replaced"
            log("backend-unknown", name=name, action=action)


def unknown_names() -> set[str]:
    """The backends in use that are not known. Empty where torch.distributed is not in use."""
    return {name for name, _, _ in _configured()}


def _unknown() -> list[tuple[str, Any]]:
    torch = sys.modules["torch"]
    found: list[tuple[str, Any]] = []
    for name, device, group in _configured():
        try:
            found.append((name, group._get_backend(torch.device(device))))
        except Exception:  # a group that is all Python has no backends, and is its own
            found.append((name, group))
    return found


def _configured() -> list[tuple[str, str, Any]]:
    """Name, device type and group, for every backend that is not known."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available():
        return []
    found: list[tuple[str, str, Any]] = []
    for group, config in list(distributed.distributed_c10d._world.pg_backend_config.items()):
        for item in str(config).split(","):
            device, _, name = item.partition(":")
            if name and name not in _KNOWN and not is_nccl(name):
                found.append((name, device, group))
    return found


def _abort(name: str, backend: Any) -> None:
    try:
        backend.abort()
    except Exception as error:
        log("abort-failed", backend=name, error=repr(error)[:500])
