"""All that a training step reads and changes, and how a rank that lost it gets it back, bit for bit."""

import argparse
import ctypes
import hashlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from hyperpodrun import RestorePlan
from model import GPT


class TrainState:
    """Model, optimizer and random number generators: built once per process, they outlive the epochs."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.seed: int = args.seed
        self.device = device
        self.model = GPT(args.layers, args.width, args.heads, args.block_size).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr, fused=True)
        self.rng: dict[int, list[torch.Tensor]] = {}  # step: the generators as they are when it begins
        self.reset()

    def reset(self) -> None:
        """Become the state before step 0, in place.

        All ranks share one seed, so that any rank's generators can stand in for a lost rank's.
        """
        torch.manual_seed(self.seed)
        self.model.init_weights()
        self.optimizer.state.clear()
        self.rng = {0: self.read_rng()}

    def remember_rng(self, step: int) -> None:
        """Note the generators as `step` will find them, and keep the note of the step before.

        To be called between backward, the last to draw numbers, and optimizer.step(): a rank interrupted
        before its update repeats the step and needs the older note, one interrupted after it the newer.
        """
        self.rng = {step - 1: self.rng[step - 1], step: self.read_rng()}

    def restore(self, plan: RestorePlan) -> int:
        """Bring every rank to the state that rank plan.source holds; return the step to go on with.

        All of it travels as one row of bytes; none is written before all have arrived. A rank that is at this
        state already gets the bytes it has.
        """
        if plan.source is None:
            self.reset()
            return 0
        step = plan.target_step
        is_source = dist.get_rank() == plan.source
        rng = self.rng[step] if is_source else self.read_rng()  # a receiver's are only to be overwritten
        rows = [as_bytes(tensor) for tensor in (*self.tensors(), *rng)]
        wire = torch.cat([row.to(self.device) for row in rows])
        dist.broadcast(wire, src=plan.source)
        for row, received in zip(rows, wire.split([len(row) for row in rows]), strict=True):
            row.copy_(received)
        self.rng = {step: rng}
        torch.set_rng_state(rng[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(rng[1], self.device)
        return step

    def tensors(self) -> Iterator[torch.Tensor]:
        """Parameters, buffers and AdamW's state, in a fixed order; zeros where AdamW has made none yet.

        A model whose forward changes buffers (BatchNorm) must note them for each step, like the generators.
        """
        yield from self.model.parameters()
        yield from self.model.buffers()
        for parameter in self.model.parameters():
            adam = self.optimizer.state[parameter]
            yield adam.setdefault("step", torch.zeros((), device=self.device))
            yield adam.setdefault("exp_avg", torch.zeros_like(parameter))
            yield adam.setdefault("exp_avg_sq", torch.zeros_like(parameter))

    def digest(self) -> str:
        """SHA-256 over all tensors."""
        sha = hashlib.sha256()
        for tensor in self.tensors():
            row = as_bytes(tensor).cpu()
            sha.update(ctypes.string_at(row.data_ptr(), len(row)))
        return sha.hexdigest()

    def read_rng(self) -> list[torch.Tensor]:
        """Copies of the states of torch's generators."""
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's own memory, seen as a row of bytes."""
    return tensor.detach().view(-1).view(torch.uint8)
