"""Training that PyTorch's modules and optimizers know nothing of, registered as a StateProvider of its own.

`--fault KIND:RANK:STEP`, before the update; the n-th fires in epoch n only.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from hyperpodrun import CheckpointManager, HPCallWrapper, HPWrapper
from hyperpodrun.checkpointless.errors import RestoreError
from hyperpodrun.checkpointless.state.provider import Skeleton, StateProvider, TensorSpec, specify


class Momentum:
    """Weights and their velocity, which is not there before the first update, and a count of updates."""

    def __init__(self) -> None:
        self.weights = torch.linspace(-1, 1, 1000)
        self.velocity: torch.Tensor | None = None
        self.count = 0

    def update(self, gradient: torch.Tensor) -> None:
        self.velocity = gradient.clone() if self.velocity is None else self.velocity.mul_(0.9).add_(gradient)
        self.weights -= 0.1 / (1 + self.count) * self.velocity
        self.count += 1

    def shard(self) -> str:
        return ""

    def named_tensors(self) -> dict[str, torch.Tensor]:
        there = {"weights": self.weights}
        return there if self.velocity is None else {**there, "velocity": self.velocity}

    def skeleton(self) -> list[TensorSpec]:
        return specify(self.named_tensors())

    def materialise(self, skeleton: Skeleton) -> None:
        shapes = {name: shape for name, _, shape, _ in skeleton}
        if shapes.get("weights") != tuple(self.weights.shape):
            raise RestoreError("other weights")
        self.velocity = torch.zeros(shapes["velocity"]) if "velocity" in shapes else None

    def host_state(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_host_state(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]

    def versions(self) -> int:
        return self.weights._version

    def quiesce(self) -> None: ...

    def reset(self) -> None: ...

    def drop(self) -> None:
        self.weights, self.velocity = torch.empty(0), None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--fault", action="append", default=[])
    args = parser.parse_args()
    faults = [fault.split(":") for fault in args.fault]
    manager = CheckpointManager(enable_offload=args.offload, enable_checksum=True)
    kept = Momentum()

    @HPWrapper(checkpoint_manager=manager)
    def train(caller: HPCallWrapper) -> None:
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        torch.manual_seed(rank)
        own = Momentum() if args.offload else kept
        assert isinstance(own, StateProvider)
        manager.register(own=own)
        for step in manager.steps(8):
            gradient = own.weights.sin() + torch.rand(1000)
            manager.begin_backward()
            dist.all_reduce(gradient)
            if faults[caller.epoch : caller.epoch + 1] and faults[caller.epoch][1:] == [str(rank), str(step)]:
                if faults[caller.epoch][0] == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError("on purpose")
            with manager.update():
                own.update(gradient)
        text = own.weights.numpy().tobytes() + own.velocity.numpy().tobytes() + str(own.count).encode()
        rows = [None] * dist.get_world_size()
        dist.all_gather_object(rows, hashlib.sha256(text).hexdigest())
        if rank == 0:
            print("digest", rows[0] if len(set(rows)) == 1 else rows, flush=True)
        dist.destroy_process_group()

    train()


if __name__ == "__main__":
    main()
