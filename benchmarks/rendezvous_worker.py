"""A script of `rendezvous.py`: says that it is there, then trains in step with the others until it is told to stop.

Every entry into training leaves a file with the time of its first completed all-reduce.
"""

import os
import sys
import time
from pathlib import Path

ROOM = Path(sys.argv[1])
RANK = os.environ["RANK"]
(ROOM / f"line.{RANK}.{os.getpid()}").write_text(str(time.monotonic_ns()))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from hyperpodrun import HPCallWrapper, HPWrapper  # noqa: E402


@HPWrapper()
def train(caller: HPCallWrapper | None = None) -> None:
    dist.init_process_group("gloo")
    rank, first = dist.get_rank(), True
    if caller is not None and caller.plan is not None:
        with caller.restoring():
            dist.barrier()
    stop = torch.zeros(1)
    while not stop.item():
        stop[0] = float((ROOM / "stop").exists())
        dist.all_reduce(stop, op=dist.ReduceOp.MAX)
        if first:
            first = False
            (ROOM / f"first.{rank}.{time.monotonic_ns()}").touch()
        time.sleep(0.005)
    dist.destroy_process_group()


train()
