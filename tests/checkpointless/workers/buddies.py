"""Two ranks as if on two nodes exchange snapshots: one leaves one out, one has no room, and the next is right again."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import torch
import torch.distributed as dist
from hyperpodrun.checkpointless.state.provider import specify
from hyperpodrun.checkpointless.step.tracker import Learned
from hyperpodrun.checkpointless.transfer.buckets import Memory
from hyperpodrun.checkpointless.transfer.header import Header
from hyperpodrun.checkpointless.transfer.peer_copies import PeerCopies
from hyperpodrun.checkpointless.transfer.snapshot_files import CHUNK_BYTES, SnapshotFiles, contents, inventory
from hyperpodrun.protocol.names import STATE_DIRECTORY


def tensors(rank: int, step: int) -> dict[str, torch.Tensor]:
    """Rank 0's are the longer ones, and no snapshot is a whole number of chunks."""
    generator = torch.Generator().manual_seed(step * 2 + rank)
    return {"a": torch.randn(CHUNK_BYTES // 4 * (3 - 2 * rank) + 7, generator=generator), "b": torch.ones(3) * rank}


def write(files: SnapshotFiles, rank: int, step: int) -> Path:
    held = tensors(rank, step)
    header = Header(step, specify(held), {}, {"count": step}, b"note", (0, b""), Learned(), {})
    return files.publish(rank, step, contents(header, Memory(held)))


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    directory = Path(os.environ[STATE_DIRECTORY]) / f"node-{rank}"
    directory.mkdir()
    files = SnapshotFiles(directory, rank)
    (directory / f".unfinished-{rank}-{rank}").write_bytes(b"of a process that was killed")
    files.remove_unfinished()
    buddy = PeerCopies(rank, 1, files, lambda: False)
    buddy.exchange(write(files, rank, 3), 3)
    buddy.exchange(write(files, rank, 6) if rank == 0 else None, 6)  # rank 1 was slow
    full, publish = True, files.publish

    def without_room(owner: int, step: int, chunks) -> Path:
        if owner != rank and full:
            next(iter(chunks))
            raise OSError(errno.ENOSPC, "no space left")
        return publish(owner, step, chunks)

    files.publish = without_room
    try:
        buddy.exchange(write(files, rank, 9), 9)
        raise AssertionError("there was no room")
    except OSError as error:
        assert error.errno == errno.ENOSPC
    full = False
    buddy.exchange(write(files, rank, 12), 12)

    other = 1 - rank
    assert sorted(inventory(directory)) == sorted(
        [(rank, 9), (rank, 12), (other, 12), (other, 6 if rank == 1 else 3)]
    ), inventory(directory)
    for owner, step in inventory(directory):
        header, memory = files.load(owner, step)
        assert header.step == step
        assert header.host_state == {"count": step}
        for name, tensor in tensors(owner, step).items():
            assert torch.equal(memory.rows[name], tensor.view(torch.uint8)), (owner, step, name)
    assert not list(directory.glob(".unfinished*"))
    dist.barrier()
    print(f"rank {rank}: all as it should be", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
