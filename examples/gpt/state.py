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
    """Model, optimizer and random number generators: built once per process, it outlives the epochs."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.seed: int = args.seed
        self.device = device
        self.model = GPT(args.layers, args.width, args.heads, args.block_size).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr)
        self.rng: dict[int, list[torch.Tensor]] = {}  # step: the generators' states as that step begins
        self.reset()

    def reset(self) -> None:
        """Become the state before step 0, the same on every rank: all share one seed, so that any rank's
        generators can stand in for a lost rank's. In place, for others hold references to the model."""
        torch.manual_seed(self.seed)
        self.model.init_weights()
        self.optimizer.state.clear()
        self.rng = {0: self._read_rng()}

    def remember_rng(self, step: int) -> None:
        """Note the generators' states for `step`, the next one; keep the running step's.

        Call it after backward, the last to draw numbers, and before optimizer.step(). A rank interrupted before
        its update repeats the step and finds the older note; one interrupted after it finds the newer.
        """
        self.rng = {step - 1: self.rng[step - 1], step: self._read_rng()}

    def restore(self, plan: RestorePlan) -> int:
        """Bring this rank, on every rank, to the state that plan.source holds; returns the step to run next.

        The state travels as one row of bytes, without pickle. A rank that already is at the step gets the bytes
        it has; nothing is written before all have arrived.
        """
        if plan.source is None:
            self.reset()
            return 0
        step = plan.target_step
        rng = self.rng[step] if dist.get_rank() == plan.source else self._read_rng()  # elsewhere only for its size
        rows = [_as_bytes(tensor) for tensor in (*self.tensors(), *rng)]
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
        """Parameters, buffers and AdamW's state in a fixed order; what AdamW has not made yet, it would make so.

        A model whose forward writes to a buffer (BatchNorm) would need notes of it, as for the generators.
        """
        yield from self.model.parameters()
        yield from self.model.buffers()
        for parameter in self.model.parameters():
            state = self.optimizer.state[parameter]
            yield state.setdefault("step", torch.tensor(0.0))
            yield state.setdefault("exp_avg", torch.zeros_like(parameter))
            yield state.setdefault("exp_avg_sq", torch.zeros_like(parameter))

    def digest(self) -> str:
        """SHA-256 over all tensors: equal for two runs only if they ended bit for bit alike."""
        sha = hashlib.sha256()
        for tensor in self.tensors():
            row = _as_bytes(tensor).cpu()
            sha.update(ctypes.string_at(row.data_ptr(), len(row)))
        return sha.hexdigest()

    def _read_rng(self) -> list[torch.Tensor]:
        if self.device.type == "cuda":
            return [torch.get_rng_state(), torch.cuda.get_rng_state(self.device)]
        return [torch.get_rng_state()]


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's own memory, seen as a row of bytes."""
    return tensor.detach().view(-1).view(torch.uint8)
