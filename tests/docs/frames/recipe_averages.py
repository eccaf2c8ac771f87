"""docs/recipes.md: an exponential average of the weights, and a plain one of the last steps."""

from types import SimpleNamespace

import torch
from hyperpodrun import CheckpointManager, HPWrapper
from snippet_harness import faulty, finish
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

config = SimpleNamespace(steps=14, average_from=5)
manager = CheckpointManager()
model = faulty(torch.nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)


def batch(step):
    return torch.randn(4, 8)


# <snippet>


@HPWrapper(checkpoint_manager=manager)
def run_main():
    torch.distributed.init_process_group()
    manager.restore()
    ddp = manager.data_parallel(model)  # noqa: F841 - the snippet uses it
    # <snippet>


run_main()
finish()
