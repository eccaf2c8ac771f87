"""Hugging Face accelerate: a linear model on random data, on every rank of the launch."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2, accelerator.state
set_seed(0)
inputs = torch.randn(256, 8)
data = TensorDataset(inputs, inputs @ torch.randn(8, 1))
model = torch.nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model, optimizer, batches = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=16, shuffle=True))
losses = []
for _ in range(3):
    for batch, target in batches:
        loss = torch.nn.functional.mse_loss(model(batch), target)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
assert losses[-1] < losses[0] / 2, losses
weights = accelerator.gather(accelerator.unwrap_model(model).weight.detach())
assert torch.equal(weights[0], weights[1])
if accelerator.is_main_process:
    print(f"trained: loss {losses[0]:.3f} -> {losses[-1]:.3f}", flush=True)
accelerator.end_training()
