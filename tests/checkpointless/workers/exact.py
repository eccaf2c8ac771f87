"""Trains a small model with everything that can betray a restart, breaks on purpose, prints what it ends with.

Dropout, batch norm, gradient accumulation, a scheduler, a gradient scaler, random numbers of numpy, Python and
generators of its own, a data loader's position in a `state_dict`, another seed on every rank.
Faults are `KIND:RANK:STEP:MOMENT`; the n-th fires in epoch n only. Moments of a restore do not look at the step:
`restore` (about to give, or everything received but the small state), `receiving` (some of the tensors are there),
`sending` (with --stream), `source` (it is the source that dies meanwhile).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import sys
from collections.abc import Sequence

import numpy
import torch
import torch.distributed as dist
from hyperpodrun import CheckpointManager, HPCallWrapper, HPWrapper
from hyperpodrun.checkpointless.state import small
from hyperpodrun.checkpointless.transfer import exchange, remote_memory
from hyperpodrun.checkpointless.transfer import restore as restoring
from hyperpodrun.checkpointless.transfer.buckets import Memory
from torch import nn


class Data:
    """A stream that remembers its position, and the order in which it was consumed."""

    def __init__(self) -> None:
        self.position = 0
        self.order = ""

    def next(self) -> torch.Tensor:
        rank = dist.get_rank()
        generator = torch.Generator().manual_seed(self.position * 1000 + rank)
        self.position += 1
        batch = torch.randn(8, 16, generator=generator)
        self.order = hashlib.sha256(self.order.encode() + batch.numpy().tobytes()).hexdigest()
        return batch

    def state_dict(self) -> dict[str, object]:
        return {"position": self.position, "order": self.order}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.position, self.order = state["position"], state["order"]


IN_A_RESTORE = ("restore", "receiving", "sending", "source")
HALF = 5
"""Tensors to be read before a fault in the middle of it, one by one; the model has 8, with its optimizer 32."""


class Faults:
    """Fires the fault of this epoch when its moment comes."""

    def __init__(self, texts: list[str]) -> None:
        self.faults = [text.split(":") for text in texts]
        self.epoch = self.rank = 0
        self.step = -1
        self.reads = 0

    def reach(self, moment: str, victim: int | None = None) -> None:
        if self.epoch >= len(self.faults):
            return
        kind, rank, step, where = self.faults[self.epoch]
        if where != moment or int(rank) != self.rank or (moment not in IN_A_RESTORE and int(step) != self.step):
            return
        print(f"fault {self.epoch} {kind} rank {rank} step {step} {where}", file=sys.stderr, flush=True)
        if kind == "kill":
            os.kill(victim or os.getpid(), signal.SIGKILL)
            return
        if kind == "exit":
            os._exit(3)
        raise RuntimeError("on purpose")

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model[2].register_forward_pre_hook(lambda *_: self.reach("forward"))
        model[0].weight.register_hook(lambda _: self.reach("allreduce"))
        optimizer.register_step_pre_hook(lambda *_: self.reach("begin"))
        optimizer.register_step_post_hook(lambda *_: self.reach("inside"))
        adopt, give = restoring.Restorer._adopt, restoring.Restorer._give

        def broken_adopt(*args, **kwargs):
            self.reach("restore")  # the tensors are there, the small state is not
            return adopt(*args, **kwargs)

        def broken_give(*args, **kwargs):
            self.reach("restore")
            return give(*args, **kwargs)

        restoring.Restorer._adopt, restoring.Restorer._give = broken_adopt, broken_give
        read, isend = remote_memory.read, exchange.Link.isend
        remote_memory._BATCH_SEGMENTS = 1

        def broken_read(pid: int, batch: Sequence[remote_memory.Segment]) -> None:
            self.reads += 1
            if self.reads == HALF:
                self.reach("receiving")
                self.reach("source", victim=pid)
            read(pid, batch)

        def broken_isend(*args):
            self.reach("sending")
            return isend(*args)

        remote_memory.read, exchange.Link.isend = broken_read, broken_isend


def send_wrong_bytes() -> None:
    """As if the memory of this rank were damaged: what it sends is not what its checksums say."""
    send, checksum = restoring.send, Memory.checksum

    def damaged(*args, **kwargs):
        Memory.checksum = lambda self, bucket: checksum(self, bucket) + 1
        try:
            send(*args, **kwargs)
        finally:
            Memory.checksum = checksum

    restoring.send = damaged


def make(args: argparse.Namespace):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 64), nn.BatchNorm1d(64), nn.Dropout(0.2), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    # A scale that overflows now and then: such a step is left out, and the scale changes.
    scaler = torch.amp.GradScaler("cpu", args.scaler or 1.0, growth_interval=2, enabled=args.scaler is not None)
    rank = int(os.environ["RANK"])
    generators = (random.Random(rank), numpy.random.default_rng(rank), torch.Generator().manual_seed(rank))
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9), scaler, generators


def train(args, manager, faults, objects, data, caller: HPCallWrapper | None = None):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if objects is None:
        objects = make(args)
        faults.attach(objects[0], objects[1])
    torch.manual_seed(rank)
    random.seed(rank)
    numpy.random.seed(rank)
    model, optimizer, scheduler, scaler, (dice, numbers, noises) = objects
    manager.register(
        model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler, data=data,
        dice=dice, numbers=numbers, noises=noises,
    )  # fmt: skip
    faults.epoch, faults.rank, faults.reads = caller.epoch, rank, 0
    if rank == args.damaged and caller.epoch == 0:
        send_wrong_bytes()
    manager.restore()
    ddp = manager.data_parallel(model, bucket_cap_mb=0.005)
    for step in manager.steps(args.steps):
        faults.step = step
        window = step % args.accumulate
        if window == 0:
            optimizer.zero_grad()
        noise = random.random() + numpy.random.rand() + numpy.random.randn()
        noise += dice.random() + numbers.random()
        batch = data.next() + noise + torch.rand(1, generator=noises)
        last = window == args.accumulate - 1
        with ddp.no_sync() if not last else torch.enable_grad():
            loss = ddp(batch).square().mean() * (1000 if args.scaler else 1)
            scaler.scale(loss).backward()
        faults.reach("before")
        if last:
            scale = scaler.get_scale()
            scaler.step(optimizer)
            faults.reach("after")
            scaler.update()
            if scaler.get_scale() < scale and rank == 0:
                print(f"step {step} is left out", flush=True)
            scheduler.step()
        total = torch.ones(1)
        dist.all_reduce(total)  # as for logging: a fault in it finds everybody behind the update
        faults.reach("between")
    return objects


def digest(objects, data: Data) -> str:
    model, optimizer, scheduler, scaler, (dice, numbers, noises) = objects
    own = hashlib.sha256()
    tensors = [*model.state_dict().values()]
    for parameter in model.parameters():
        tensors += [value for _, value in sorted(optimizer.state[parameter].items())]
    for tensor in [*tensors, torch.get_rng_state()]:
        own.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    own.update(repr((random.random(), numpy.random.rand(), data.order, scheduler.state_dict())).encode())
    own.update(repr((scaler.state_dict(), dice.random(), numbers.random(), torch.rand(1, generator=noises))).encode())
    rows = [None] * dist.get_world_size()
    dist.all_gather_object(rows, own.hexdigest())
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--scaler", type=float, metavar="SCALE", help="scale the gradients, to begin with by so much")
    parser.add_argument("--rebuild", action="store_true", help="make model and optimizer anew in every epoch")
    parser.add_argument("--checksum", action="store_true")
    parser.add_argument("--damaged", type=int, help="a rank that sends wrong bytes")
    parser.add_argument("--stream", action="store_true", help="through the process group, also on one host")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--rollback", action="store_true")
    parser.add_argument("--buffers-on-device", action="store_true", help="treat buffers as if they were a GPU's")
    parser.add_argument("--fault", action="append", default=[])
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.stream:
        remote_memory.address_space = lambda: ""
    if args.buffers_on_device:
        small._is_on_device = lambda buffer: True
    manager = CheckpointManager(enable_checksum=args.checksum, enable_offload=args.offload, rollback=args.rollback)
    faults, data, objects = Faults(args.fault), Data(), None
    if not args.rebuild:
        objects = make(args)
        faults.attach(objects[0], objects[1])
    run = HPWrapper(checkpoint_manager=manager)(train)
    objects = run(args, manager, faults, objects, data)
    result = digest(objects, data)
    if dist.get_rank() == 0:
        print("digest", result, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
