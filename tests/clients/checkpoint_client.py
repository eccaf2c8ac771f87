"""torch.distributed.checkpoint: train, save, spoil, load, train on."""

from __future__ import annotations

import os
import shutil
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
inputs = torch.randn(64, 8)
target = inputs @ torch.randn(8, 1)


def train(steps: int) -> float:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs), target)
        loss.backward()
        optimizer.step()
    return loss.item()


shared = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
dist.broadcast_object_list(shared)
directory = os.path.join(str(shared[0]), "checkpoint")
first = train(10)
weights, moments = get_state_dict(model, optimizer)
dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=directory)
then = train(10)

with torch.no_grad():
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
weights, moments = get_state_dict(model, optimizer)
state = {"model": weights, "optimizer": moments}
dcp.load(state, checkpoint_id=directory)
set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
assert train(10) == then, "what was loaded trains as what was saved"
dist.barrier()
if dist.get_rank() == 0:
    shutil.rmtree(str(shared[0]))
    print(f"trained: loss {first:.3f} -> {then:.3f}, again after loading", flush=True)
dist.destroy_process_group()
