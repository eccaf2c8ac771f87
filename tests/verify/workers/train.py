"""A small training job that is right, or wrong in the way that its argument says."""

import os
import sys

import torch
import torch.distributed as dist
from hyperpodrun import CheckpointManager, HPCallWrapper, HPWrapper

WRONG = sys.argv[1] if len(sys.argv) > 1 else ""
torch.set_num_threads(1)
torch.manual_seed(0)
if WRONG == "random":
    torch.seed()
manager = CheckpointManager(rollback=True)
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
average = torch.zeros(1)
"""Of all losses: nobody registers it."""
registered = {"model": model, "optimizer": optimizer}
if WRONG == "refused":
    registered["callback"] = print
assert not os.path.exists("checkpoint"), "another run's working directory"


@HPWrapper(checkpoint_manager=manager)
def main(caller: HPCallWrapper = None) -> None:
    dist.init_process_group("gloo")
    manager.register(**registered)
    manager.restore()
    ddp = manager.data_parallel(model)
    for step in manager.steps(6):
        optimizer.zero_grad()
        loss = ddp(torch.full((2, 4), 1.0 + step + caller.rank)).square().mean()
        if WRONG == "forgotten":  # the part of a repeated step before the fault is added twice
            average.add_(loss.detach())
            loss = loss * average
        loss.backward()
        optimizer.step()
        print("step", step, "rank", caller.rank, flush=True)


main()
open("checkpoint", "w").close()
print("weights", [float(value) for value in model.weight.detach().flatten()], flush=True)
