"""docs/recipes.md: mixed precision, with an overflow on the way, and gradients of several passes for one update."""

import contextlib
from types import SimpleNamespace

import torch
from hyperpodrun import CheckpointManager, HPWrapper
from snippet_harness import faulty, finish

config = SimpleNamespace(steps=15, accumulate=3, device="cpu")
manager = CheckpointManager()
model = faulty(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(), torch.nn.Linear(8, 1)))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)


def batch(step):
    return torch.randn(4, 8) * (float("inf") if step == 4 else 1)


@HPWrapper(checkpoint_manager=manager)
def run_main():
    torch.distributed.init_process_group()
    # <snippet>
    manager.restore()
    ddp = manager.data_parallel(model)  # noqa: F841 - the snippet uses it
    # <snippet>


run_main()
finish()
