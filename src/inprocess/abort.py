"""Breaking what the main thread can be stuck in, from another thread.

Each piece is an `Abort`, called on the monitor thread with what it needs to know; `Compose` puts several together.
After them the main thread can be interrupted: no collective, no data loader holds it in a call that never returns.
Measurements behind the choices: gloo does not implement `abort()`, but `shutdown(2)` on its connected sockets frees a
blocked collective in about a millisecond; on its listening socket it would terminate the process.

Gloo forgets a send that fails with EPIPE before it has seen the end of the stream, and a message that is cut in the
middle: whoever waits for one waits until the group's timeout (seen with many small all-reduces, in one of four
faults). So only the reading side is shut, after what is on its way has arrived, and the connection is kept open, by a
descriptor of our own, until every rank is out. A peer that dies closes it all the same: `waits_in_gloo` tells.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import platform
import signal
import socket
import stat
import sys
import termios
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LONGEST_ARRIVAL_S = 0.05
_FUTEX = {"x86_64": "202", "aarch64": "98"}.get(platform.machine(), "")

_held: list[socket.socket] = []
"""The connections of a failed epoch, until the next one starts."""


@dataclass(frozen=True)
class AbortState:
    """What an Abort knows of the fault. `timeout` in seconds is for all of them together."""

    epoch: int
    gloo_listeners: frozenset[tuple[str, int]]
    timeout: float


class Abort(ABC):
    """Called on the monitor thread while the main thread is anywhere. An error is logged and the others still run."""

    @abstractmethod
    def __call__(self, state: AbortState) -> None: ...


class Compose(Abort):
    """Several aborts as one. As in a composition of functions, and in HyperPod, the last one listed runs first."""

    def __init__(self, *aborts: Abort) -> None:
        self.aborts = aborts

    def __call__(self, state: AbortState) -> None:
        errors: list[str] = []
        for abort in reversed(self.aborts):
            try:
                abort(state)
            except Exception as error:
                errors.append(f"{type(abort).__name__}: {error!r}")
        if errors:
            raise RuntimeError("; ".join(errors))


class AbortGloo(Abort):
    """Ends the streams of the epoch's gloo groups: of connected sockets with a published listener at either end."""

    def __call__(self, state: AbortState) -> None:
        if not state.gloo_listeners:
            return
        sockets = [
            found
            for name in os.listdir("/proc/self/fd")
            if (found := _connected(int(name), state.gloo_listeners)) is not None
        ]
        _held.extend(sockets)
        _let_arrive(sockets)
        for found in sockets:
            with contextlib.suppress(OSError):  # the peer is gone, and with it the connection
                found.shutdown(socket.SHUT_RD)


def release_connections() -> None:
    """Closes what `AbortGloo` has kept open, once every rank has left the epoch it belonged to."""
    while _held:
        _held.pop().close()


class AbortNccl(Abort):
    """`ProcessGroupNCCL.abort()` of every group, in parallel: one after the other costs half a second each."""

    def __call__(self, state: AbortState) -> None:
        torch = sys.modules.get("torch")
        if torch is None or "torch.distributed" not in sys.modules or not torch.cuda.is_available():
            return
        threads = [
            threading.Thread(target=backend.abort, name="hyperpodrun-nccl-abort", daemon=True)
            for backend in _nccl_backends(torch)
        ]
        deadline = time.monotonic() + state.timeout
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        stuck = sum(thread.is_alive() for thread in threads)
        if stuck:
            raise TimeoutError(f"{stuck} of {len(threads)} NCCL aborts did not return within {state.timeout} s")


class AbortDataLoaders(Abort):
    """Kills the worker processes of torch DataLoaders: a busy one would delay the end of its loader by seconds.

    torch is told first to forget them, or its SIGCHLD handler would raise in the main thread, wherever that is.
    """

    def __call__(self, state: AbortState) -> None:
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


class AbortTorchDistributed(Compose):
    """All communicators of torch.distributed: NCCL and gloo."""

    def __init__(self) -> None:
        super().__init__(AbortGloo(), AbortNccl())


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


def _connected(fd: int, listeners: frozenset[tuple[str, int]]) -> socket.socket | None:
    """A descriptor of our own for a connected socket with one of these ends; None if `fd` is anything else.

    Of our own because another thread may close and reuse the number at any moment.
    """
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return None
        duplicate = socket.socket(fileno=os.dup(fd))
    except OSError:
        return None
    try:
        if duplicate.family in (socket.AF_INET, socket.AF_INET6) and duplicate.type == socket.SOCK_STREAM:
            ends = (duplicate.getpeername()[:2], duplicate.getsockname()[:2])  # OSError: not connected, so not ours
            if any(end in listeners for end in ends):
                return duplicate
    except OSError:
        pass
    duplicate.close()
    return None


def waits_in_gloo() -> bool:
    """Whether the main thread or one of gloo's is in a wait that only gloo could end: a futex with a deadline.

    To be asked when the sockets have been shut for a while and the main thread has not followed its signals.
    """
    for name in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):
            is_main = int(name) == os.getpid()
            if is_main or Path(f"/proc/self/task/{name}/comm").read_text().startswith("pt_gloo_runloop"):
                number, *arguments = Path(f"/proc/self/task/{name}/syscall").read_text().split()
                if number == _FUTEX and int(arguments[3], 16):
                    return True
    return False


def _let_arrive(sockets: Sequence[socket.socket]) -> None:
    """Waits, for a moment at most, until nothing is on its way on these sockets; mostly that is so at once."""
    deadline = time.monotonic() + _LONGEST_ARRIVAL_S
    while any(_in_flight(found) for found in sockets) and time.monotonic() < deadline:
        time.sleep(0.0005)


def _in_flight(found: socket.socket) -> bool:
    """Bytes that were received and not read, or written and not acknowledged."""
    try:
        counts = [fcntl.ioctl(found, request, bytes(4)) for request in (termios.FIONREAD, termios.TIOCOUTQ)]
    except OSError:
        return False
    return any(int.from_bytes(count, sys.byteorder) for count in counts)


def _nccl_backends(torch: Any) -> list[Any]:
    world = torch.distributed.distributed_c10d._world
    backends: list[Any] = []
    for group in list(world.pg_map):
        with contextlib.suppress(RuntimeError):
            backend = group._get_backend(torch.device("cuda"))
            if hasattr(backend, "abort") and backend.name() == "nccl":
                backends.append(backend)
    return backends


def _has_children() -> bool:
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{thread}/children") as file:
            if file.read().strip():
                return True
    return False
