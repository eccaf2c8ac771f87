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
model = faulty(torch.nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
manager.register(model=model, optimizer=optimizer)
loader = DataLoader(torch.arange(640.0).view(80, 8) / 640, batch_size=4, shuffle=True)
if not config.resume.exists():
    weights = {name: torch.ones_like(value) for name, value in model.state_dict().items()}
    torch.save({"model": weights, "optimizer": optimizer.state_dict()}, config.resume)


@HPWrapper(checkpoint_manager=manager)
def run_main():
    torch.distributed.init_process_group()
    # <snippet>
    ddp = manager.data_parallel(model)  # noqa: F841 - the snippet uses it
    # <snippet>


run_main()
finish()
