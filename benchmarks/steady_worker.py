"""Trains two models of the example in turn, one recoverable, and times their steps."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import hyperpodrun
import torch
import torch.distributed as dist
from hyperpodrun import CheckpointManager, HPWrapper
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "gpt"))
from data import Batches
from model import GPT

STEPS = 12
"""In a block; the first ones find the other model in the caches, and do not count."""
NOT_COUNTED = 2
WARM_UP = 10


class Training:
    """One model at the example's own sizes, with all that its step has."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = GPT(4, 128, 4, 64)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, fused=True)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 100_000)
        self.ddp: torch.nn.Module = self.model

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.ddp(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--blocks", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    plain, managed = Training(0), Training(0)
    manager = CheckpointManager()
    manager.register(model=managed.model, optimizer=managed.optimizer, scheduler=managed.scheduler)

    @HPWrapper(checkpoint_manager=manager)
    def run_main() -> None:
        dist.init_process_group("gloo")
        manager.restore()
        managed.ddp = manager.data_parallel(managed.model)
        plain.ddp = torch.nn.parallel.DistributedDataParallel(plain.model)
        batches = Batches(0, 10_000, dist.get_rank(), 4, 64)
        taken = {"plain": 0, "managed": 0}

        def step_plain() -> None:
            plain.step(*batches[taken["plain"] % 1000])

        def step_managed() -> None:
            manager.begin_step()
            managed.step(*batches[taken["managed"] % 1000])
            manager.end_step()

        def block(name: str, step: Callable[[], None]) -> float:
            times = []
            for number in range(STEPS):
                begin = time.perf_counter()
                step()
                taken[name] += 1
                if number >= NOT_COUNTED:
                    times.append(time.perf_counter() - begin)
            return statistics.median(times) * 1e6

        for _ in range(WARM_UP):
            block("plain", step_plain)
            block("managed", step_managed)
        pairs = []
        for number in range(args.blocks):
            order = [("plain", step_plain), ("managed", step_managed)]
            found = {name: block(name, step) for name, step in (order if number % 2 else reversed(order))}
            pairs.append((found["plain"], found["managed"]))
        fact = {"rank": dist.get_rank(), "code": str(Path(hyperpodrun.__file__).parent), "pairs": pairs}
        with (args.directory / "facts.jsonl").open("a") as file:
            file.write(json.dumps(fact) + "\n")
        dist.barrier()

    run_main()


if __name__ == "__main__":
    main()
