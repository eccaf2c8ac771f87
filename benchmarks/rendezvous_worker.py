"""A script of `rendezvous.py`: says that it is there, then trains in step with the others until it is told to stop.

Every entry into training leaves a file with the time of its first completed all-reduce, and in it the times of what
came before that.
"""

import json
import os
import sys
import time
from pathlib import Path

ROOM = Path(sys.argv[1])
RANK = os.environ["RANK"]


def process_began_ns() -> int:
    """By the clock of `monotonic_ns`; the kernel says it in ticks since the machine was started."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    asleep_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.monotonic_ns()
    return int(fields[19]) * 1_000_000_000 // os.sysconf("SC_CLK_TCK") - asleep_ns


times = {"process": process_began_ns(), "line": time.monotonic_ns()}
(ROOM / f"line.{RANK}.{os.getpid()}").write_text(str(times["line"]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from hyperpodrun import HPCallWrapper, HPWrapper  # noqa: E402

times["imports"] = time.monotonic_ns()


@HPWrapper()
def train(caller: HPCallWrapper | None = None) -> None:
    times["function"] = time.monotonic_ns()
    dist.init_process_group("gloo")
    rank, first = dist.get_rank(), True
    if caller is not None and caller.plan is not None:
        with caller.restoring():
            dist.barrier()
    times["group"] = time.monotonic_ns()
    stop = torch.zeros(1)
    while not stop.item():
        stop[0] = float((ROOM / "stop").exists())
        dist.all_reduce(stop, op=dist.ReduceOp.MAX)
        if first:
            first = False
            times["all-reduce"] = time.monotonic_ns()
            written = ROOM / f"{rank}.tmp"
            written.write_text(json.dumps(times))
            written.rename(ROOM / f"first.{rank}.{times['all-reduce']}")
        time.sleep(0.005)
    dist.destroy_process_group()


train()
