"""Checkpoints on disk in the background, through torch.distributed.checkpoint: the last resort.

Every rank saves its own part under the name of its shard, so replicas are written once. A checkpoint is a directory
`step-<n>`; it is complete when it has its `.metadata`, which is written last.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from ...protocol.values import decode, encode
from ..errors import RestoreError
from ..state.provider import StateProvider
from .header import Header

_log = logging.getLogger("hyperpodrun.checkpointless")

_NAME = re.compile(r"step-(\d+)")
_KEPT = 2
_WRITE_LIMIT_S = 3600.0


class DiskCheckpoints:
    """The checkpoints under `path`, one every `every` steps."""

    def __init__(self, path: Path, every: int) -> None:
        self._path = path
        self._every = every
        self._group: Any = None
        self._agreement: Any = None
        self._pending: Any = None
        self._unreadable: set[int] = set()

    def start(self) -> None:
        """An epoch begins; on all ranks together."""
        self._pending = None
        # Not the group of training: its collectives must not mix with those of a thread, and NCCL has no CPU tensors.
        together = dist.is_initialized()
        self._group = dist.new_group(backend="gloo") if together else None
        self._agreement = dist.new_group(backend="gloo") if together else None

    def due(self, step: int) -> bool:
        return step % self._every == 0

    def save(self, header: Header, shard: str, rank: int, state: StateProvider) -> None:
        """Begins a checkpoint: copies the state, then writes it in the background.

        One that is still being written makes this one be left out, on all ranks: a checkpoint is made together.
        """
        if not self._all_idle():
            _log.warning("checkpoint of step %d left out: the one before it is still being written", header.step)
            return
        self._settle()
        from torch.distributed import checkpoint

        described = torch.frombuffer(bytearray(encode(header.as_dict())), dtype=torch.uint8)
        tensors = {_key(shard, name): tensor for name, tensor in state.named_tensors().items()}
        with self._surviving():
            self._path.mkdir(parents=True, exist_ok=True)
            self._pending = checkpoint.async_save(
                {**tensors, f"header/{rank}": described},
                checkpoint_id=self._path / f"step-{header.step}",
                process_group=self._group,
                no_dist=self._group is None,
            )
            if rank == 0:
                self._prune(header.step)

    def stop(self) -> None:
        """The epoch has failed: what is being written may never be complete."""
        self._pending = None

    def finish(self) -> None:
        """Training is over: the last checkpoint is waited for."""
        if self._pending is not None:
            self._settle()

    def newest(self) -> int | None:
        """The newest complete checkpoint's step, without those that turned out to be unreadable."""
        complete = {step for step, path in self._found() if (path / ".metadata").is_file()}
        return max(complete - self._unreadable, default=None)

    def load(self, step: int, rank: int) -> Header:
        """The header of this rank's part. Raises RestoreError."""
        from torch.distributed import checkpoint
        from torch.distributed.checkpoint import FileSystemReader

        directory = self._path / f"step-{step}"
        with self._reading(directory, step):
            metadata = FileSystemReader(directory).read_metadata()
            entry = metadata.state_dict_metadata.get(f"header/{rank}")
            if entry is None:
                raise RestoreError(f"it was written by a job of another size: it has no rank {rank}")
            row = torch.empty(entry.size, dtype=torch.uint8)  # type: ignore[union-attr]
            with _quiet():
                checkpoint.load({f"header/{rank}": row}, checkpoint_id=directory, no_dist=True)
            return Header.from_dict(decode(row.numpy().tobytes()))

    def fill(self, step: int, shard: str, tensors: dict[str, torch.Tensor]) -> None:
        """Reads the tensors of a shard into their places. Raises RestoreError."""
        from torch.distributed import checkpoint

        directory = self._path / f"step-{step}"
        with self._reading(directory, step), _quiet():
            checkpoint.load(
                {_key(shard, name): tensor for name, tensor in tensors.items()},
                checkpoint_id=directory,
                no_dist=True,
            )

    def _all_idle(self) -> bool:
        """Whether the last checkpoint is written everywhere. Ranks see that at different times, so they agree."""
        idle = torch.tensor([self._pending is None or self._pending.done()], dtype=torch.int32)
        if self._agreement is not None:
            dist.all_reduce(idle, dist.ReduceOp.MIN, self._agreement)
        return bool(idle.item())

    def _settle(self) -> None:
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        with self._surviving():
            pending.result(_WRITE_LIMIT_S)

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        """Training does not depend on what a storage backend raises while it writes."""
        from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

        try:
            yield
        except TimeoutError:
            _log.warning("a checkpoint on disk was not written within %g s: it is given up", _WRITE_LIMIT_S)
        except (Exception, CheckpointException) as error:
            _log.warning("a checkpoint on disk failed: %s", _in_short(error))

    @contextlib.contextmanager
    def _reading(self, directory: Path, step: int) -> Iterator[None]:
        """What a storage backend raises while it reads is a RestoreError. The next plan is made without that step."""
        from torch.distributed.checkpoint.api import CheckpointException

        try:
            yield
        except (Exception, CheckpointException) as error:
            self._unreadable.add(step)
            raise RestoreError(f"the checkpoint {directory} cannot be read: {_in_short(error)}") from None

    def _found(self) -> list[tuple[int, Path]]:
        with contextlib.suppress(FileNotFoundError):
            matches = [(_NAME.fullmatch(name), self._path / name) for name in os.listdir(self._path)]
            return [(int(match[1]), path) for match, path in matches if match]
        return []

    def _prune(self, current: int) -> None:
        """Complete checkpoints older than the last ones go."""
        complete = sorted(s for s, path in self._found() if s < current and (path / ".metadata").is_file())
        for step in complete[:-_KEPT]:
            shutil.rmtree(self._path / f"step-{step}", ignore_errors=True)


def _key(shard: str, name: str) -> str:
    return f"{shard or 'all'}/{name}"


def _in_short(error: BaseException) -> str:
    """A sentence; torch's own text has the traceback of every rank."""
    failures: dict[int, tuple[BaseException, object]] = getattr(error, "failures", {})
    return "; ".join(f"rank {rank}: {cause!r}" for rank, (cause, _) in sorted(failures.items())) or repr(error)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without DCP's warning that a load without process group is one: it is meant to be."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
