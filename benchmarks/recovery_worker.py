"""The worker of `recovery.py`: trains a small MLP and breaks once. One file, one math under every launcher.

Gradients are reduced and weights updated by hand: DDP and torch.optim would import torch._dynamo, over a
second in each new process, which would only widen the distance between restarting in process and starting
processes. Without --inprocess it is a plain torchrun script: it loads its checkpoint when it starts. With
it, state lives on in the processes, and a new one is sent it by a survivor.
What it did is told in files of --directory, one for each fact, attempt and rank.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import itertools
import json
import os
import signal
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

if TYPE_CHECKING:
    from hyperpodrun import HPCallWrapper

WIDTHS = (256, 1024, 640, 128)
"""About a million weights."""
BATCH = 64
LEARNING_RATE = 0.05


class State:
    """The weights, in one flat tensor, and how many steps made them."""

    def __init__(self) -> None:
        shapes = [shape for a, b in itertools.pairwise(WIDTHS) for shape in ((a, b), (b,))]
        sizes = [torch.Size(shape).numel() for shape in shapes]
        self.flat = torch.zeros(sum(sizes))
        pieces = torch.split(self.flat, sizes)
        self.weights = [p.view(shape).requires_grad_() for p, shape in zip(pieces, shapes, strict=True)]
        self.step = 0
        self.reset()

    def reset(self) -> None:
        """Become what every run begins with."""
        generator = torch.Generator().manual_seed(0)
        self.flat.copy_(torch.randn(self.flat.numel(), generator=generator) * 0.03)
        self.step = 0

    def gradient(self, rank: int) -> torch.Tensor:
        """Of this rank's batch of the step that is next."""
        generator = torch.Generator().manual_seed(self.step * 1000 + rank)
        hidden = torch.randn(BATCH, WIDTHS[0], generator=generator)
        labels = torch.randint(WIDTHS[-1], (BATCH,), generator=generator)
        for i in range(0, len(self.weights), 2):
            hidden = torch.addmm(self.weights[i + 1], hidden.relu() if i else hidden, self.weights[i])
        gradients = torch.autograd.grad(F.cross_entropy(hidden, labels), self.weights)
        return torch.cat([gradient.view(-1) for gradient in gradients])

    def update(self, gradient: torch.Tensor) -> None:
        """SGD with a summed gradient."""
        self.flat.sub_(gradient, alpha=LEARNING_RATE / dist.get_world_size())
        self.step += 1

    def digest(self) -> str:
        """SHA-256 of the weights."""
        return hashlib.sha256(ctypes.string_at(self.flat.data_ptr(), self.flat.nbytes)).hexdigest()

    def save(self, path: Path) -> None:
        """Write a checkpoint, all of it or nothing."""
        torch.save({"flat": self.flat, "step": self.step}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        """Become the last checkpoint, if there is one."""
        if path.exists():
            saved: dict[str, Any] = torch.load(path)
            self.flat.copy_(saved["flat"])
            self.step = saved["step"]


class Journal:
    """Tells the benchmark what happened: each fact is a file of its own, there as a whole or not at all."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def write(self, fact: str, **fields: object) -> None:
        rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        row = {"fact": fact, "attempt": attempt, "rank": rank, "pid": os.getpid(), **fields}
        path = self._directory / f"{fact}.{attempt}.{rank}.json"
        new = path.with_suffix(".new")
        new.write_text(json.dumps(row))
        new.replace(path)


def train(args: argparse.Namespace, state: State, journal: Journal, caller: HPCallWrapper | None = None) -> None:
    """To the last step. After a fault HPWrapper enters it again; without, a new process does."""
    dist.init_process_group("gloo")
    rank, attempt = dist.get_rank(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if caller is None:
        state.load(args.directory / "checkpoint.pt")
    elif caller.plan is not None:
        with caller.restoring():
            restore(state, caller)
    entered_at, times = state.step, []
    while state.step < args.steps:
        begin_ns = time.monotonic_ns()
        gradient = state.gradient(rank)
        if args.fault != "none" and (rank, state.step, attempt) == (args.fault_rank, args.fault_step, 0):
            break_down(args.fault, journal)  # the others wait for this rank's gradient, or soon will
        dist.all_reduce(gradient)
        if caller is None:
            state.update(gradient)
        else:
            with caller.atomic():
                state.update(gradient)
                caller.step_completed()
        now_ns = time.monotonic_ns()
        times.append((now_ns - begin_ns) / 1e6)
        if state.step == entered_at + 1:
            journal.write("stepped", ns=now_ns, step=state.step)
        if caller is None and rank == 0 and state.step % args.checkpoint_every == 0:
            state.save(args.directory / "checkpoint.pt")
    journal.write("ended", digest=state.digest(), step_ms=statistics.median(times))


def restore(state: State, caller: HPCallWrapper) -> None:
    """Bring every rank to the state that the plan's source holds; where all hold it, nothing travels."""
    assert caller.plan is not None
    if caller.plan.source is None:
        state.reset()
    elif caller.plan.moves:
        dist.broadcast(state.flat, src=caller.plan.source)
        state.step = caller.plan.target_step


def break_down(kind: str, journal: Journal) -> None:
    """The fault."""
    journal.write("fault", ns=time.monotonic_ns())
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("a fault on purpose")


def main() -> None:
    """Parse the options, train, part."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--inprocess", action="store_true")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--fault", choices=["none", "raise", "kill"], required=True)
    parser.add_argument("--fault-rank", type=int, default=1)
    parser.add_argument("--fault-step", type=int, default=30)
    parser.add_argument("--checkpoint-every", type=int, default=10)
    args = parser.parse_args()
    entry = train
    if args.inprocess:  # torchrun's processes need not pay for an import they do not use
        from hyperpodrun import HPWrapper

        entry = HPWrapper()(train)
    entry(args, State(), Journal(args.directory))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
