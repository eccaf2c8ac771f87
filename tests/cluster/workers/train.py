"""Data parallel training whose result depends on nothing that only one rank knows: a digest to compare after faults.

What a rank alone knows (its random generators) can be lost with its node; `examples/gpt` has such state, this has not.
"""

import hashlib
import sys

import torch
import torch.distributed as dist
from hyperpodrun import HPCallWrapper, HPWrapper

STEPS = int(sys.argv[1])
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 64))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
for parameter in model.parameters():
    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def say(text: str) -> None:
    """A whole line at once: its agent writes to the same file."""
    sys.stdout.write(f"{text}\n")


def state() -> list[torch.Tensor]:
    buffers = [optimizer.state[parameter]["momentum_buffer"] for parameter in model.parameters()]
    return [*(parameter.data for parameter in model.parameters()), *buffers]


@HPWrapper()
def train(caller: HPCallWrapper | None = None) -> None:
    assert caller is not None
    dist.init_process_group("gloo")
    rank, first = dist.get_rank(), 0
    if caller.plan is not None and caller.plan.source is not None:
        with caller.restoring():
            for tensor in state():
                dist.broadcast(tensor, caller.plan.source)
        first = caller.plan.target_step
    if rank == 0:
        say(f"epoch {caller.epoch}: step {first}, world {dist.get_world_size()}")
    for step in range(first, STEPS):
        inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(step * 1000 + rank))
        optimizer.zero_grad()
        (model(inputs) - inputs).pow(2).mean().backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
        if rank == 0:
            say(f"step {step + 1}")
    if rank == 0:
        digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state()))
        say(f"digest {digest.hexdigest()}")


train()
