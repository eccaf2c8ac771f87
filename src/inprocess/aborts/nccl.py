"""NCCL's groups: aborted without waiting for their threads, watched for errors, kept from ending the process.

`ProcessGroupNCCL.abort()` raises the communicators' abort flags at once, and their kernels end within milliseconds.
Then it waits for NCCL's proxy service thread, which sleeps in `poll(2)` for up to 500 ms before it looks at the flag
(NCCL 2.28, src/proxy.cc): the half second that every abort takes, whatever the number of ranks. Nothing on the way to
the next epoch depends on that wait, nor on the buffers that are freed after it. So only the beginning of the aborts
is waited for, and the end of the device's work (`health.CudaHealthCheck`); the rest happens on threads that nobody
waits for until their deadline.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..log import log
from .abort import Abort, AbortState

_TEARS_DOWN = (None, "1", "3")
"""Values of TORCH_NCCL_ASYNC_ERROR_HANDLING, unset included, with which torch's watchdog ends the process on an error;
1 is what torchrun, and therefore the agent, gives every worker."""

_QUIET = {
    # The watchdog reports errors (`errors()` below) instead of ending the process by std::terminate.
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
    # The heartbeat thread of a process that has once seen a timeout would write a dump and then end the process, and so
    # would those of all later groups: the flag it goes by is never reset.
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    # After an error the watchdog sleeps for four times this, a minute by default, and a group's destructor with it.
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",
}


@contextlib.contextmanager
def surviving_errors() -> Iterator[None]:
    """Within, groups are made so that torch's own threads leave the process alone when a collective fails.

    They read their settings from the environment when a group is made. What the user has set stays, but for a
    TORCH_NCCL_ASYNC_ERROR_HANDLING that ends the process. Afterwards the environment is what it was.
    """
    handling = os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING")
    wanted = {name: value for name, value in _QUIET.items() if name not in os.environ}
    if handling in _TEARS_DOWN:
        wanted["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name in wanted:
            os.environ.pop(name, None)
        if handling is not None:
            os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = handling


class AbortNccl(Abort):
    """`ProcessGroupNCCL.abort()` of every group, in parallel, each begun when this returns and none waited for."""

    def __call__(self, state: AbortState) -> None:
        for backend in backends():
            _pending.begin(backend, state.epoch, state.timeout)

    def again(self, state: AbortState) -> None:
        """A communicator that was being set up exists by now. What is aborted already stays so."""
        if not _pending.alive():
            self(state)


@dataclass(frozen=True)
class _PendingAbort:
    thread: threading.Thread
    epoch: int
    deadline: float
    """On `time.monotonic`'s clock."""


class _PendingAborts:
    """The aborts of this process that have begun and not ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: list[_PendingAbort] = []

    def begin(self, backend: Any, epoch: int, timeout: float) -> None:
        def abort() -> None:
            nonlocal backend
            try:
                backend.abort()
            except Exception as error:  # that of a timeout or of a broken context: the health check tells that one
                log("nccl-abort-failed", epoch=epoch, error=repr(error)[:500])
            finally:
                backend = None  # the last reference, mostly: its destructor joins the group's threads

        thread = threading.Thread(target=abort, name="hyperpodrun-nccl-abort", daemon=True)
        thread.start()
        with self._lock:
            self._all.append(_PendingAbort(thread, epoch, time.monotonic() + timeout))

    def alive(self) -> list[_PendingAbort]:
        """Those that have not returned."""
        with self._lock:
            self._all = [pending for pending in self._all if pending.thread.is_alive()]
            return list(self._all)

    def overdue(self) -> list[int]:
        """The epochs whose communicators should have been gone by now."""
        now = time.monotonic()
        return sorted({pending.epoch for pending in self.alive() if pending.deadline < now})

    def join(self, timeout: float) -> None:
        """Waits for all, up to `timeout` seconds together: a process must not end inside a group's destructor."""
        deadline = time.monotonic() + timeout
        with self._lock:
            threads = [pending.thread for pending in self._all]
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))


_pending = _PendingAborts()


def overdue_aborts() -> list[int]:
    """The epochs whose NCCL aborts have not returned within their abort_timeout."""
    return _pending.overdue()


def wait_for_aborts(timeout: float) -> None:
    """Waits until the aborts that have begun are over, up to `timeout` seconds."""
    _pending.join(timeout)


def can_be_used() -> bool:
    """Whether this process's torch has NCCL at all; False also where torch is not imported yet."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_nccl_available()


def backends() -> list[Any]:
    """The NCCL backends of all process groups. Empty where torch, CUDA or a group is missing."""
    return [backend for _, backend in _groups()]


def _groups() -> list[tuple[Any, Any]]:
    """The process groups with an NCCL backend, and that backend."""
    torch = sys.modules.get("torch")
    if torch is None or "torch.distributed" not in sys.modules or not torch.cuda.is_initialized():
        return []
    found: list[tuple[Any, Any]] = []
    device = torch.device("cuda")
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        with contextlib.suppress(RuntimeError):  # a group without a backend for CUDA
            backend = group._get_backend(device)
            if hasattr(backend, "abort") and is_nccl(backend.name()):
                found.append((group, backend))
    return found


def is_nccl(name: str) -> bool:
    """Whether a backend of this name is NCCL's: `nccl`, or `nccl2`, as torch 2.15 calls what succeeds it."""
    return name.startswith("nccl")


def collectives() -> dict[str, int]:
    """By name of group: how many collectives this rank has begun on NCCL. Single sends and receives do not count."""
    counts: dict[str, int] = {}
    for group, backend in _groups():
        with contextlib.suppress(RuntimeError, AttributeError):  # a group that is broken, or does not count
            counts[str(group.group_name)] = int(backend._get_sequence_number_for_group())
    return counts


def ahead_of(fewest: Mapping[str, int]) -> bool:
    """Whether this rank has begun a collective that a rank with these numbers has not."""
    return bool(fewest) and any(count > fewest.get(name, count) for name, count in collectives().items())


def device_is_busy() -> bool:
    """Whether anything is queued on the device's default stream that has not ended."""
    torch = sys.modules["torch"]
    try:
        return not torch.cuda.default_stream().query()
    except RuntimeError:  # a device in error: that is told by other means
        return False


def errors() -> list[str]:
    """What torch's watchdogs have found: a sentence for each NCCL group with a failed or overdue collective."""
    told = {"TIMEOUT": "a collective did not end within its timeout", "COMM_ERROR": "a collective failed"}
    found: list[str] = []
    for backend in backends():
        get_error = getattr(backend, "get_error", None)  # torch 2.7 and newer
        name = "SUCCESS" if get_error is None else get_error().name
        if name != "SUCCESS":
            what = told.get(name, "a collective failed on another rank")
            found.append(f"NCCL, group of {backend.size()} ranks: {what} ({name})")
    return found
