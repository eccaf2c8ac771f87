"""A script of `launch.py`: one step of a small model under DDP; each rank writes when it had completed it."""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    """One argument: the directory for the times."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(16, 64)).square().mean().backward()
    optimizer.step()
    stepped_ns = time.monotonic_ns()
    (Path(sys.argv[1]) / f"stepped.{os.environ['RANK']}").write_text(str(stepped_ns))
    # torch 2.13: a DDP object that is dropped while gloo's thread still drops the last all-reduce of backward can hang.
    # Both want the GIL. All launchers alike; seen in 1 of 4 ranks, more often the faster they are.
    time.sleep(0.2)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
