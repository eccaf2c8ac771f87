"""torch.multiprocessing and DataLoader inside a worker, with fork, spawn and forkserver."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import DataLoader, Dataset

METHODS = ("fork", "spawn", "forkserver")


class Numbers(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index), float(os.environ["RANK"])])


def child(index: int, answers: mp.SimpleQueue) -> None:
    answers.put((index, int(os.environ["RANK"]), torch.ones(2).sum().item()))


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    seen = torch.zeros(1)
    for method in METHODS:
        answers = mp.get_context(method).SimpleQueue()
        processes = mp.start_processes(child, args=(answers,), nprocs=2, join=False, start_method=method)
        got = sorted(answers.get() for _ in range(2))
        while not processes.join():
            pass
        assert got == [(0, rank, 2.0), (1, rank, 2.0)], got
        loader = DataLoader(Numbers(), batch_size=4, num_workers=1, multiprocessing_context=method)
        batches = list(loader)
        assert [batch[:, 0].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]], batches
        assert {value for batch in batches for value in batch[:, 1].tolist()} == {float(rank)}
        seen += 1
    dist.all_reduce(seen)
    assert seen.item() == len(METHODS) * dist.get_world_size()
    if rank == 0:
        print(f"trained: nothing, but {', '.join(METHODS)} work", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
