"""docs/dataloader.md: a training whose batches are prepared by a process that outlives the workers."""

import functools
from types import SimpleNamespace

import torch
import torch.distributed as dist
from hyperpodrun import CheckpointManager, HPWrapper
from snippet_harness import faulty, finish
from torch.utils.data import DataLoader, Dataset, DistributedSampler

config = SimpleNamespace(steps=14)
manager = CheckpointManager()


@functools.cache
def build():
    """Once per process, and not in those that prepare batches: they import this script, too."""
    model = faulty(torch.nn.Linear(8, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


class MyDataset(Dataset):
    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 256

    def __getitem__(self, index):
        return torch.full((8,), index / 256) + torch.randn(8)


@HPWrapper(checkpoint_manager=manager)
def run_main(config):
    model, optimizer = build()
    dist.init_process_group()
    manager.register(model=model, optimizer=optimizer)
    data = batches(manager.restore())
    ddp = manager.data_parallel(model)
    for _ in manager.steps(config.steps):
        loss = ddp(next(data)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# <snippet>

if __name__ == "__main__":
    finish()
