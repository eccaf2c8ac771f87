"""Faults on demand: `--inject KIND:rank=R,step=S[,where=PLACE]` breaks this job on purpose, once.

What a fault is called, how it breaks the process, and which of several is due in which epoch is
`hyperpodrun.testing`'s; its `grammar` tells why an injection never fires twice. Here is where in *this* model the
faults fire: in the middle of the forward pass, and so late in the backward pass that the gradients of the later layers
are being reduced. A script without such hooks is broken from outside: `HYPERPODRUN_INJECT`, docs/verify.md.
"""

import argparse
import os

import torch
from hyperpodrun import HPCallWrapper
from hyperpodrun.testing import Injection, fire, numbered
from model import GPT


def injected(text: str) -> Injection:
    """Read the option's value."""
    try:
        return Injection.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}.") from None


class FaultInjector:
    """Fires the injections that are due. The train loop keeps `step` up to date."""

    def __init__(self, injections: list[Injection]) -> None:
        self.step = self.rank = self.epoch = 0
        self.events = numbered(injections)

    def attach(self, model: GPT, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Reach into the step. Without injections nothing is hooked. `module`: the model as it is called."""
        if not self.events:
            return
        if module is model:
            middle = model.blocks[len(model.blocks) // 2]
            middle.register_forward_pre_hook(lambda *_: self.reach("forward"))
            # The first block's gradients come late: the later layers' buckets are being reduced.
            model.blocks[0].qkv.weight.register_hook(lambda _: self.reach("backward"))
        else:  # compiled: hooks inside would make other kernels of it, and other roundings
            module.register_forward_pre_hook(lambda *_: self.reach("forward"))
            module.register_forward_hook(lambda *args: self._watch_backward(args[-1]))
        optimizer.register_step_pre_hook(lambda *_: self.reach("before-update"))
        # Runs when the parameters have changed, before hyperpodrun's own hook takes the step for complete.
        optimizer.register_step_post_hook(lambda *_: self.reach("in-update"))

    def _watch_backward(self, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: self.reach("backward"))

    def begin(self, caller: HPCallWrapper | None, rank: int) -> None:
        """An epoch starts. torchrun's restarts are epochs too."""
        self.epoch = max(caller.epoch if caller else 0, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
        self.rank = rank

    def reach(self, where: str) -> None:
        """This rank is at that place of the step: fire what is due there."""
        for event, injection in self.events:
            here = (injection.rank, injection.step, injection.where) == (self.rank, self.step, where)
            if here and event == self.epoch:
                fire(injection)
