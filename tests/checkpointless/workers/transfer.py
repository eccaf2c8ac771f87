"""Two ranks send a state in every way there is; each check prints a line."""

from __future__ import annotations

import itertools
import sys

import torch
import torch.distributed as dist
from hyperpodrun.checkpointless.errors import ChecksumError, RestoreError
from hyperpodrun.checkpointless.transfer import exchange, remote_memory
from hyperpodrun.checkpointless.transfer.buckets import BUCKET_BYTES, Memory
from layouts import DTYPES, LAYOUTS, bits, make

SHAPES = {
    "large": (BUCKET_BYTES // 4 * 2 + 3,),
    "scalar": (),
    "empty": (0,),
    "matrix": (1000, 70),
    **{f"small {i}": (i, 7) for i in range(1, 200)},
}


def state(rank: int) -> dict[str, torch.Tensor]:
    """The source's numbers, or others that are to be written over. The matrix is transposed in memory."""
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tensors["matrix"] = tensors["matrix"].t().contiguous().t()
    if rank:
        tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    odd = itertools.product(DTYPES, ((), (0, 2), (3, 4)), LAYOUTS)
    return tensors | {f"odd {at}": make(*spec, seed=at + 1000 * rank)[0] for at, spec in enumerate(odd)}


def move(rank: int, *, checksum: bool) -> None:
    tensors = state(rank)
    if rank == 0:
        exchange.send(exchange.Link(), 1, {"word": "here"}, Memory(tensors), checksum=checksum)
    else:
        header = exchange.receive(exchange.Link(), 0, lambda header: Memory(tensors))
        assert header["word"] == "here"
        for name, tensor in state(0).items():
            assert bits(tensors[name]) == bits(tensor), name


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    read = remote_memory.read
    used: list[int] = []

    def counted(*args) -> None:
        used.append(1)
        read(*args)

    remote_memory.read = counted
    for checksum in (False, True):
        move(rank, checksum=checksum)
    assert rank == 0 or used, "not through the peer's memory"

    used.clear()

    def refused(*args) -> None:
        raise PermissionError("as Yama says")

    remote_memory.read = refused
    move(rank, checksum=True)  # both sides thought it could be read: the receiver asks for buckets
    exchange.remote_memory.address_space = lambda: ""
    for checksum in (False, True):
        move(rank, checksum=checksum)
    assert not used

    if rank == 0:
        exchange.Memory.checksum = lambda self, bucket: torch.tensor([1, 2])
    try:
        move(rank, checksum=True)
        assert rank == 0
    except ChecksumError as error:
        assert error.source == 0

    if rank == 0:  # a source that talks nonsense
        exchange.Link().receive_bytes(1)
        exchange.Link().send_bytes(b"\xc1 nonsense", 1)
    else:
        try:
            exchange.receive(exchange.Link(), 0, lambda header: Memory({}))
            sys.exit("nonsense was taken for a header")
        except RestoreError:
            pass
    dist.barrier()
    print(f"rank {rank}: all as it should be", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
