"""docs/recipes.md: mixed precision, with an overflow on the way."""

from types import SimpleNamespace

import torch
from hyperpodrun import CheckpointManager, HPWrapper
from snippet_harness import faulty, finish

config = SimpleNamespace(steps=14, device="cpu")
manager = CheckpointManager()
model = faulty(torch.nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)


def batch(step):
    return torch.randn(4, 8) * (float("inf") if step == 2 else 1)


@HPWrapper(checkpoint_manager=manager)
def run_main():
    torch.distributed.init_process_group()
    # <snippet>


run_main()
finish()
