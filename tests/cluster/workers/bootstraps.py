"""Groups that come up again and again: `bootstraps.py EPOCHS`. Every rank says when it has begun, and what it has.

In each of these epochs the ranks make groups for as long as nothing stops them; in the one after the last, they end.
"""

import sys
import time

import torch
import torch.distributed as dist
from hyperpodrun import HPCallWrapper, HPWrapper

EPOCHS = int(sys.argv[1])


def say(text: str) -> None:
    """A whole line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


@HPWrapper()
def train(caller: HPCallWrapper | None = None) -> None:
    assert caller is not None
    say(f"epoch {caller.epoch} begins")
    dist.init_process_group("gloo")
    deadline = time.monotonic() + 60
    count = 0
    while count < 3 or caller.epoch < EPOCHS:
        assert time.monotonic() < deadline, "nothing has struck"
        group = dist.new_group(list(range(dist.get_world_size())))
        total = torch.ones(1)
        dist.all_reduce(total, group=group)
        assert total.item() == dist.get_world_size()
        count += 1
        if count % 20 == 0:
            dist.destroy_process_group()
            dist.init_process_group("gloo")
    say(f"epoch {caller.epoch} is clean")


train()
