"""docs/recipes.md: epochs with a DataLoader and its workers, a validation and a scheduler after each."""

import itertools
from types import SimpleNamespace

import torch
import torch.distributed as dist
from hyperpodrun import CheckpointManager, HPWrapper
from snippet_harness import faulty, finish
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class Numbers(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.full((8,), index / 40) + torch.randn(8)  # an augmentation


config = SimpleNamespace(steps=14)
data, validation = Numbers(), [torch.full((4, 8), 0.1 * i) for i in range(3)]
manager = CheckpointManager()
layers = torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(), torch.nn.Linear(8, 1)
model = faulty(torch.nn.Sequential(*layers))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)


@HPWrapper(checkpoint_manager=manager)
def run_main():
    dist.init_process_group()
    manager.register(model=model, optimizer=optimizer, scheduler=scheduler)
    # <snippet>
    ddp = manager.data_parallel(model)  # noqa: F841 - the snippet uses it
    # <snippet>


run_main()
finish()
