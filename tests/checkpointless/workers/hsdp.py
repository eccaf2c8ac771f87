"""FSDP2 with replicas (HSDP 2x2): the model is sharded over pairs, every shard is held twice, ranks are lost.

With --zero it is DDP, and ZeroRedundancyOptimizer shards the state of the optimizer over the same pairs.
`--fault KIND:RANKS:STEP:MOMENT`, RANKS like 0+2 for several at once; the n-th fires in epoch n only.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import sys

import torch
import torch.distributed as dist
from hyperpodrun import CheckpointManager, HPCallWrapper, HPWrapper
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer


class Faults:
    """Fires the fault of this epoch when its moment comes."""

    def __init__(self, texts: list[str]) -> None:
        self.faults = [text.split(":") for text in texts]
        self.epoch = 0
        self.step = -1
        self.pids: list[int] = []

    def reach(self, moment: str) -> None:
        if self.epoch >= len(self.faults):
            return
        kind, ranks, step, where = self.faults[self.epoch]
        if where != moment or str(dist.get_rank()) not in ranks.split("+") or int(step) != self.step:
            return
        print(f"fault {self.epoch} {kind} rank {dist.get_rank()} step {step} {where}", file=sys.stderr, flush=True)
        if kind == "kill":
            lost = [self.pids[int(other)] for other in ranks.split("+")]
            for pid in sorted(lost, key=lambda pid: pid == os.getpid()):  # the others first, this one last
                os.kill(pid, signal.SIGKILL)
        raise RuntimeError("on purpose")


def build(faults: Faults, *, zero: bool):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.1), nn.ReLU()) for _ in range(3)])
    model[1].register_forward_pre_hook(lambda *_: faults.reach("forward"))
    if zero:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        mine = pairs[dist.get_rank() // 2]
        adam = torch.optim.AdamW
        optimizer = ZeroRedundancyOptimizer(model.parameters(), adam, process_group=mine, lr=1e-2)
        optimizer.optim.register_step_post_hook(lambda *_: faults.reach("part"))  # then the parts are exchanged
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer.register_step_post_hook(lambda *_: faults.reach("inside"))
    return model, optimizer


def train(args, manager: CheckpointManager, faults: Faults, caller: HPCallWrapper) -> None:
    dist.init_process_group("gloo")
    rank, faults.epoch = dist.get_rank(), caller.epoch
    faults.pids = [0] * dist.get_world_size()
    dist.all_gather_object(faults.pids, os.getpid())
    model, optimizer = build(faults, zero=args.zero)
    torch.manual_seed(rank)
    manager.register(model=model, optimizer=optimizer)
    manager.restore()
    forward = manager.data_parallel(model) if args.zero else model
    for step in manager.steps(args.steps):
        faults.step = step
        generator = torch.Generator().manual_seed(step * 100 + rank)
        loss = forward(torch.randn(8, 32, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        faults.reach("before")
        optimizer.step()
        faults.reach("between")
    own = hashlib.sha256()
    states = optimizer.optim.state if args.zero else optimizer.state
    for parameter in model.parameters():
        state = [value for _, value in sorted(states.get(parameter, {}).items())]
        for tensor in (parameter.detach(), *state):
            tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            own.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    own.update(torch.get_rng_state().numpy().tobytes())
    rows = [None] * dist.get_world_size()
    dist.all_gather_object(rows, own.hexdigest())
    if rank == 0:
        print("digest", hashlib.sha256(repr(rows).encode()).hexdigest(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--zero", action="store_true")
    parser.add_argument("--snapshot-every", type=int)
    parser.add_argument("--disk")
    parser.add_argument("--rollback", action="store_true")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--fault", action="append", default=[])
    args = parser.parse_args()
    torch.set_num_threads(1)
    manager = CheckpointManager(
        enable_offload=args.offload,
        rollback=args.rollback,
        snapshot_every=args.snapshot_every,
        disk_path=args.disk,
        disk_every=3,
    )
    HPWrapper(checkpoint_manager=manager)(train)(args, manager, Faults(args.fault))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
