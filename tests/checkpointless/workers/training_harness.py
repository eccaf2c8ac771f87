"""What the small trainings of `trainings.py` and `trainings_more.py` have in common; each has one way to fail.

`SCRIPT NAME[,NAME...] [fault]` prints a digest per rank and name. `fault` breaks a rank where the class NAME says so with `boom`.
"""

import hashlib
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from hyperpodrun import CheckpointManager, HPCallWrapper, HPWrapper
from torch import nn

NAMES, FAULT = sys.argv[1].split(","), "fault" in sys.argv[2:]
KIND = next((a for a in sys.argv[2:] if a in ("raise", "kill")), None)
STEPS = 20
torch.set_num_threads(1)
torch.manual_seed(0)
manager = CheckpointManager(**({"rollback": True} if "rollback" in sys.argv[2:] else {}))


FIRST = {}
"""By training: the epoch in which it began, in a job of several trainings."""


def boom(caller, rank, kind="raise", who=1, epoch=0):
    if not FAULT or caller.epoch - max(FIRST.values()) != epoch or rank != who:
        return
    if (KIND or kind) == "kill":
        time.sleep(0.2)  # so that the others are where they wait for this one
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("injected")


def batch(step, rank):
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1000 * step + rank))


class Case:
    registers = True

    def __init__(self):
        self.model = nn.Linear(8, 8)
        self.opt = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.objects = dict(model=self.model, opt=self.opt)

    def enter(self, caller, rank):
        self.ddp = manager.data_parallel(self.model)

    def step(self, step, rank, caller):
        loss = self.ddp(batch(step, rank)).pow(2).mean()
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()

    def result(self):
        return [*self.model.parameters(), *self.model.buffers()]


def run(cases):
    for name in NAMES:
        torch.manual_seed(0)
        train(name, cases[name]())


def train(name, case):
    @HPWrapper(checkpoint_manager=manager)
    def main(caller: HPCallWrapper = None):
        FIRST.setdefault(name, caller.epoch if len(NAMES) > 1 else 0)
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        torch.manual_seed(getattr(case, "seed", 5) + rank * getattr(case, "own_seeds", 0))
        if case.objects:
            manager.register(**case.objects)
            manager.restore()
        case.enter(caller, rank)
        for step in manager.steps(STEPS):
            case.step(step, rank, caller)
        dist.barrier()
        data = b"".join(t.detach().contiguous().numpy().tobytes() for t in case.result())
        sys.stdout.write(f"DIGEST {name} rank {rank} {hashlib.sha256(data).hexdigest()[:12]}\n")
        sys.stdout.flush()

    main()
    if len(NAMES) > 1:
        dist.destroy_process_group()
