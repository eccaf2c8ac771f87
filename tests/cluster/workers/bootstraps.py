"""Groups that come up again and again: `bootstraps.py EPOCHS`.

In each of these epochs the ranks make groups for as long as nothing stops them; in the one after the last they end.
Every epoch has one step of an optimizer, as a job without any progress is ended.
"""

import sys
import time

import torch
import torch.distributed as dist
from hyperpodrun import HPCallWrapper, HPWrapper

EPOCHS = int(sys.argv[1])
GROUPS = 4
parameter = torch.nn.Parameter(torch.zeros(1))
optimizer = torch.optim.SGD([parameter], lr=1.0)


def say(text: str) -> None:
    """A whole line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def bootstrap() -> None:
    """All ranks, and some groups of them."""
    dist.init_process_group("gloo")
    ranks = list(range(dist.get_world_size()))
    for count in range(GROUPS):
        members = ranks[count % 2 :: 2] if count % 2 else ranks
        group = dist.new_group(members)
        if dist.get_rank() in members:
            total = torch.ones(1)
            dist.all_reduce(total, group=group)
            assert total.item() == len(members)


@HPWrapper()
def train(caller: HPCallWrapper | None = None) -> None:
    assert caller is not None
    bootstrap()
    if caller.plan is not None and caller.plan.source is not None:
        with caller.restoring():
            dist.broadcast(parameter.data, caller.plan.source)
    parameter.grad = torch.ones(1)
    optimizer.step()
    dist.barrier()
    say(f"epoch {caller.epoch} begins")
    deadline = time.monotonic() + 100
    while caller.epoch < EPOCHS:
        assert time.monotonic() < deadline, "nothing has struck"
        dist.destroy_process_group()
        bootstrap()
    say(f"epoch {caller.epoch} is clean, step {-int(parameter.item())}")


train()
