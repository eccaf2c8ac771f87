"""Where a rank computes, and how it joins the others."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist


def init_process_group(device: torch.device, timeout: float) -> None:
    """Join the job; plain `python` is a job of one rank."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def pick_device() -> torch.device:
    """This process's GPU, or the CPU."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # a sum split over threads rounds differently
        return torch.device("cpu")
    ranks, count = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if ranks > count:  # several ranks on one GPU: NCCL refuses unless it takes them for different hosts
        os.environ.setdefault("NCCL_HOSTID", f"rank-{os.environ['RANK']}")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % count)
    torch.cuda.set_device(device)
    return device
