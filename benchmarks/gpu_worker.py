"""The worker of `gpu.py`: trains the example's GPT with NCCL, several ranks on one GPU if need be, and breaks often.

In attempts 0 to FAULTS - 1 the fault comes after a few steps, so every attempt makes progress. The same file under
both launchers; with --inprocess it keeps its state in its processes, without it begins anew in every attempt, and does
not even load a checkpoint. What it did is told as in `recovery_worker.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "gpt"))

import torch
import torch.distributed as dist
from data import batch
from device import init_process_group, pick_device
from model import GPT
from recovery_worker import Journal, break_down
from torch.nn import functional as F
from train import be_deterministic

if TYPE_CHECKING:
    from hyperpodrun import CheckpointManager, HPCallWrapper

STEPS_BETWEEN = 4
"""Steps of an attempt before its fault."""
LAYERS, WIDTH, HEADS, BLOCK_SIZE, BATCH_SIZE = 4, 128, 4, 64, 4
"""Those of the example."""


class Training:
    """What lives as long as the process."""

    def __init__(self, *, compiled: bool) -> None:
        be_deterministic()
        self.device = pick_device()
        torch.manual_seed(0)
        self.model = GPT(LAYERS, WIDTH, HEADS, BLOCK_SIZE).to(self.device)
        self.module: torch.nn.Module = torch.compile(self.model) if compiled else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, fused=True)

    def step(self, ddp: torch.nn.Module, number: int) -> None:
        """One step, to its end on the device."""
        inputs, targets = batch(0, number, dist.get_rank(), BATCH_SIZE, BLOCK_SIZE)
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = ddp(inputs.to(self.device))
            loss = F.cross_entropy(logits.flatten(0, 1), targets.to(self.device).flatten())
        loss.backward()
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def train(
    args: argparse.Namespace,
    training: Training,
    journal: Journal,
    manager: CheckpointManager | None,
    caller: HPCallWrapper | None = None,
) -> None:
    """To the end, or to this attempt's fault."""
    init_process_group(training.device, timeout=60)
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    last = (args.faults + 1) * STEPS_BETWEEN
    if manager is None:
        ddp: torch.nn.Module = torch.nn.parallel.DistributedDataParallel(training.module)
        numbers = iter(range(attempt * STEPS_BETWEEN, last))
    else:
        manager.restore()
        ddp = manager.data_parallel(training.module)
        numbers = manager.steps(last)
    for done, number in enumerate(numbers, start=1):
        training.step(ddp, number)
        if done == 1:
            journal.write("stepped", ns=time.monotonic_ns(), step=number)
        if done == STEPS_BETWEEN:
            journal.write("resources", **resources(training.device))
            if attempt < args.faults and dist.get_rank() == 1:
                break_down(args.fault, journal)
    journal.write("ended")


def resources(device: torch.device) -> dict[str, int]:
    """What a restart could leak."""
    held = {"fds": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task"))}
    held["python_threads"] = threading.active_count()
    held["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        held["allocated_mb"] = torch.cuda.memory_allocated() >> 20
        held["reserved_mb"] = torch.cuda.memory_reserved() >> 20
        held["peak_mb"] = torch.cuda.max_memory_allocated() >> 20
        held["device_used_mb"] = (total - free) >> 20
        torch.cuda.reset_peak_memory_stats()
    return held


def main() -> None:
    """Parse the options, train, part."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--inprocess", action="store_true")
    parser.add_argument("--fault", choices=["raise", "kill"], required=True)
    parser.add_argument("--faults", type=int, required=True)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    journal = Journal(args.directory)
    if args.inprocess:
        from hyperpodrun import CheckpointManager, HPWrapper

        training, manager = Training(compiled=args.compile), CheckpointManager()
        manager.register(model=training.model, optimizer=training.optimizer)
        HPWrapper(checkpoint_manager=manager)(train)(args, training, journal, manager)
    else:
        train(args, Training(compiled=args.compile), journal, None)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
