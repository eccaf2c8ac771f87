"""docs/recipes.md: a script that begins from a checkpoint of its own, and fetches each batch ahead."""

import itertools
import os
from pathlib import Path
from types import SimpleNamespace

import torch
from hyperpodrun import CheckpointManager, HPWrapper
from snippet_harness import faulty, finish
from torch.utils.data import DataLoader

config = SimpleNamespace(steps=14, resume=Path(os.environ["DOC_OUT"]) / f"before-{os.environ['RANK']}.pt")
manager = CheckpointManager()


def build():
    model = faulty(torch.nn.Linear(8, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


loader = DataLoader(torch.arange(640.0).view(80, 8) / 640, batch_size=4, shuffle=True)
weights = torch.nn.Linear(8, 1)
torch.nn.init.ones_(weights.weight)
before = {"model": weights.state_dict(), "optimizer": torch.optim.AdamW(weights.parameters()).state_dict()}
torch.save(before, config.resume)

# <snippet>


@HPWrapper(checkpoint_manager=manager)
def run_main():
    torch.distributed.init_process_group()
    # <snippet>


run_main()
finish()
