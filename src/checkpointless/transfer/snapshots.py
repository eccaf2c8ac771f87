"""PeerCopies snapshots: every N steps a copy of each rank's state in host memory, here and on another node.

For the loss of everybody who holds a shard. A copy is a file (`snapshot_files.py`). It is made by a thread, while the
next step computes; only the next *update* waits for it. With several nodes the thread then sends it to the buddy.
Idea: Gemini's checkpoints in peer memory (Wang et al., SOSP 2023).
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

from ...protocol.plan import MAX_SNAPSHOTS
from ..errors import RestoreError
from ..state.provider import StateProvider
from .buckets import Memory
from .header import Header
from .peer_copies import PeerCopies, Stopped
from .snapshot_files import SnapshotFiles, contents, inventory

_log = logging.getLogger("hyperpodrun.checkpointless")

_COPY_LIMIT_S = 600.0
_STOP_LIMIT_S = 60.0
_FINISH_LIMIT_S = 120.0


class _Job:
    """A snapshot that is due. Without a state there is nothing to copy, but the buddy hears of it."""

    def __init__(self, step: int, header: Header | None = None, state: StateProvider | None = None) -> None:
        self.step = step
        self.header = header
        self.state = state
        self.copied = threading.Event()


class Snapshots:
    """The snapshots this rank makes, and those it can read. `every`: steps between two."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._files: SnapshotFiles | None = None
        self._rank = 0
        self._buddy: PeerCopies | None = None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._newest: _Job | None = None
        self._idle = threading.Event()
        self._thread: threading.Thread | None = None
        self._stopping = False

    def start(self, directory: Path | None, rank: int) -> None:
        """An epoch begins; on all ranks together, when there are several nodes."""
        self.stop()
        self._rank, self._stopping, self._newest, self._buddy = rank, False, None, None
        self._jobs = queue.SimpleQueue()
        self._idle.set()
        self._files = SnapshotFiles(directory, rank) if directory is not None else None
        if self._files is None:
            return
        self._files.remove_unfinished()
        if PeerCopies.wanted():
            local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            self._buddy = PeerCopies(rank, local, self._files, lambda: self._stopping)

    def due(self, step: int) -> bool:
        return self._files is not None and step % self._every == 0

    def make(self, header: Header, state: StateProvider) -> None:
        """Begins a snapshot. Nothing may change the state before `wait_copied` has returned.

        One that is still on its way to the buddy makes this one be left out: the network is slower than training.
        """
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="hyperpodrun-snapshot", daemon=True)
            self._thread.start()
        if not self._idle.is_set():
            _log.warning("snapshot of step %d left out: the one before it is still on its way", header.step)
            self._jobs.put(_Job(header.step))
            return
        job = _Job(header.step, header, state)
        self._idle.clear()
        self._jobs.put(job)
        self._newest = job

    def wait_copied(self) -> None:
        """Until the state may change again. Raises RestoreError when the copy has taken ten minutes."""
        if self._newest is not None and not self._newest.copied.wait(_COPY_LIMIT_S):
            raise RestoreError(f"a snapshot was not copied within {_COPY_LIMIT_S:g} s")

    def finish(self) -> None:
        """Training is over: the last snapshots arrive where they go, before the process groups are taken down."""
        if self._thread is None:
            return
        self._jobs.put(None)
        self._thread.join(_FINISH_LIMIT_S)
        if self._thread.is_alive():
            _log.warning("a snapshot of rank %d has not reached its buddy in %g s", self._rank, _FINISH_LIMIT_S)
            return
        self._thread = None

    def stop(self) -> None:
        """The epoch has failed: no snapshot is finished any more.

        Raises RestoreError when the thread cannot be stopped: it would read a state that is about to change.
        """
        self._stopping = True
        if self._thread is None:
            return
        self._jobs.put(None)
        self._thread.join(_STOP_LIMIT_S)
        if self._thread.is_alive():
            raise RestoreError(f"a snapshot on its way could not be stopped within {_STOP_LIMIT_S:g} s")
        self._thread = None

    def inventory(self, directory: Path | None) -> tuple[tuple[int, int], ...]:
        """(rank, step) of every complete snapshot in this node's directory, the newest first."""
        return () if directory is None else tuple(inventory(directory)[:MAX_SNAPSHOTS])

    def load(self, owner: int, step: int) -> tuple[Header, Memory]:
        """A snapshot of this node. Its memory is the file's own, for reading. Raises RestoreError."""
        if self._files is None:
            raise RestoreError("there is no directory for snapshots")
        return self._files.load(owner, step)

    def _run(self) -> None:
        """The thread of an epoch: one job after the other, so that every rank's exchanges are in the same order."""
        while (job := self._jobs.get()) is not None and not self._stopping:
            path: Path | None = None
            with self._reported(job.step):
                try:
                    path = self._copy(job)
                finally:
                    job.copied.set()
            if self._buddy is not None and not self._stopping:
                with self._reported(job.step):
                    self._buddy.exchange(path, job.step)
            if job.state is not None:
                self._idle.set()

    def _copy(self, job: _Job) -> Path | None:
        if job.header is None or job.state is None:
            return None
        assert self._files is not None
        return self._files.publish(self._rank, job.step, self._unless_stopped(job.header, job.state))

    def _unless_stopped(self, header: Header, state: StateProvider) -> Iterator[bytes | memoryview]:
        for chunk in contents(header, Memory(state.named_tensors())):
            if self._stopping:
                raise Stopped
            yield chunk

    @contextlib.contextmanager
    def _reported(self, step: int) -> Iterator[None]:
        """Training goes on without a snapshot; but not silently."""
        try:
            yield
        except Stopped:
            pass
        except Exception as error:  # whatever a file system or a process group raises
            if not self._stopping:
                _log.warning("snapshot of step %d of rank %d failed: %s", step, self._rank, error)
