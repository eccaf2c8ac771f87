"""Run under hyperpodrun by test_soak.py: one exception after the other, and what a process holds meanwhile."""

from __future__ import annotations

import os
import sys
import threading
import time

import psutil
import torch
import torch.distributed as dist
from hyperpodrun import HPCallWrapper, HPWrapper
from torch.nn.parallel import DistributedDataParallel

FAULTS = int(sys.argv[1])
model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)


def report(epoch: int) -> None:
    process = psutil.Process()
    deadline = time.monotonic() + 5
    while threading.active_count() > 2 and time.monotonic() < deadline:  # the reaper of the last epoch
        time.sleep(0.01)
    print(
        f"epoch={epoch} rank={os.environ['RANK']} pid={os.getpid()} fds={process.num_fds()} "
        f"threads={process.num_threads()} rss_kb={process.memory_info().rss // 1024}\n",
        end="",
        flush=True,
    )


@HPWrapper()
def run_main(caller: HPCallWrapper = None):
    dist.init_process_group("gloo")
    ddp = DistributedDataParallel(model)
    for _ in range(2):
        optimizer.zero_grad()
        ddp(torch.randn(8, 256)).sum().backward()
        optimizer.step()
    if caller.epoch % 10 == 0:
        report(caller.epoch)
    if caller.epoch < FAULTS:
        if caller.rank == caller.epoch % caller.world_size:
            raise RuntimeError(f"fault {caller.epoch}")
        ddp(torch.randn(8, 256)).sum().backward()
        time.sleep(3600)


run_main()
