"""Every rank trains a part of its own that nobody else holds, as with experts; all feel each other in the loss."""

import hashlib
import sys

import torch
import torch.distributed as dist
from hyperpodrun import CheckpointManager, HPCallWrapper, HPWrapper

STEPS, SNAPSHOT_EVERY = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Dropout(0.1), torch.nn.Linear(256, 64))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
manager = CheckpointManager(replicas=lambda rank: rank, snapshot_every=SNAPSHOT_EVERY or None)
manager.register(model=model, optimizer=optimizer)


@HPWrapper(checkpoint_manager=manager)
def train(caller: HPCallWrapper | None = None) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(rank)
    manager.restore()
    for step in manager.steps(STEPS):
        inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(step * 1000 + rank))
        loss = (model(inputs) - inputs).pow(2).mean()
        everybody = loss.detach().clone()
        dist.all_reduce(everybody)
        optimizer.zero_grad()
        (loss * everybody).backward()
        optimizer.step()
        if rank == 0:
            print(f"step {step + 1}", flush=True)
    own = hashlib.sha256()
    for parameter in model.parameters():
        for tensor in (parameter.detach(), *(value for _, value in sorted(optimizer.state[parameter].items()))):
            own.update(tensor.numpy().tobytes())
    own.update(torch.get_rng_state().numpy().tobytes())
    rows = [None] * dist.get_world_size()
    dist.all_gather_object(rows, own.hexdigest())
    if rank == 0:
        print(f"digest {hashlib.sha256(repr(rows).encode()).hexdigest()}", flush=True)


train()
