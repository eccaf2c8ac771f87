"""docs/frameworks.md: a loop with accelerate."""

import os

import torch
from accelerate import Accelerator
from common import Sentences, digest, tell
from common import build as make
from torch.utils.data import DataLoader

os.chdir(os.environ["OUTCOME"])
losses: dict[int, float] = {}


def build():
    torch.manual_seed(1)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(Sentences(50), batch_size=2, shuffle=True, num_workers=1)
    return model, optimizer, loader, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=80)


def evaluate(accelerator, model):
    with torch.no_grad():
        batch = torch.stack([Sentences(4, noisy=False)[index]["input_ids"] for index in range(4)])
        losses[len(losses)] = accelerator.reduce(model(input_ids=batch, labels=batch).loss, "mean").item()


# <snippet>

with open("out/model.safetensors", "rb") as saved:
    tell(weights=digest(saved.read()))
