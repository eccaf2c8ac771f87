"""README.md: an ordinary training script, made recoverable."""

from types import SimpleNamespace
from typing import Optional

import torch
from snippet_harness import faulty, finish

config = SimpleNamespace(steps=14)


def build():
    model = faulty(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(), torch.nn.Linear(16, 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)


def batch(step):
    generator = torch.Generator().manual_seed(step * 2 + torch.distributed.get_rank())
    return torch.randn(4, 8, generator=generator)


# <snippet>

finish()
