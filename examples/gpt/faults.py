"""Faults on demand: `--inject KIND:rank=R,step=S[,where=PLACE]` breaks this job on purpose, once.

What has fired must be known without memory: the process that remembers may be the one that dies. The rule:
the injections, in order, form *events*, and event n fires in epoch n only. An event ends its epoch, so the
epoch's number tells a re-entered and a respawned process alike how many have fired.

Different ranks at the same point of the same step are one event; a rank named there twice makes two.
`optimizer` and `between` are one point: no collective separates them.

So an injection never fires twice. It is sure to fire only if the injections are the job's only faults: a
foreign fault uses up an epoch's number, and an event that the job never reaches holds up those behind it.
"""

import argparse
import ctypes
import faulthandler
import os
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass

import torch
from hyperpodrun import HPCallWrapper
from model import GPT

KINDS = ("raise", "kill", "segv", "exit", "hang", "assert")
PLACES = {"forward": 0, "backward": 1, "optimizer": 2, "between": 2}  # name: the point within a step
_SYNTAX = re.compile(rf"({'|'.join(KINDS)}):rank=(\d+),step=(\d+)(?:,where=({'|'.join(PLACES)}))?")


@dataclass(frozen=True)
class Injection:
    """One `--inject` option."""

    kind: str
    rank: int
    step: int
    where: str = "forward"

    @classmethod
    def parse(cls, text: str) -> "Injection":
        """Read the option's value."""
        match = _SYNTAX.fullmatch(text)
        if not match:
            names = f"KIND one of {', '.join(KINDS)} and PLACE one of {', '.join(PLACES)}"
            raise argparse.ArgumentTypeError(f"{text!r} is not KIND:rank=R,step=S[,where=PLACE] with {names}.")
        kind, rank, step, where = match.groups()
        return cls(kind, int(rank), int(step), where or "forward")

    @property
    def point(self) -> tuple[int, int]:
        """When in the run it is due."""
        return self.step, PLACES[self.where]

    def fire(self) -> None:
        """Break this process."""
        what = f"rank {self.rank}, step {self.step}, {self.where}"
        print(f"injecting {self.kind}: {what}", file=sys.stderr, flush=True)
        if self.kind == "raise":
            raise RuntimeError(f"injected fault: {what}")
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "segv":
            faulthandler.disable()
            ctypes.string_at(0)
        while self.kind == "hang":  # and the others wait in their next collective
            time.sleep(1)
        if self.kind == "assert":  # on a GPU a kernel's assertion: the process can use CUDA no more
            table = torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu")
            table[torch.tensor([self.rank + 9], device=table.device)].sum().item()
        os._exit(3)


class FaultInjector:
    """Fires the injections that are due. The train loop keeps `step` up to date."""

    def __init__(self, injections: list[Injection]) -> None:
        self.step = self.rank = self.epoch = 0
        named: Counter[tuple[tuple[int, int], int]] = Counter()
        keyed = []
        for injection in sorted(injections, key=lambda i: i.point):
            times = named[injection.point, injection.rank]
            keyed.append(((injection.point, times), injection))
            named[injection.point, injection.rank] += 1
        keys = sorted({key for key, _ in keyed})
        self.events = [(keys.index(key), injection) for key, injection in keyed]

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
        # Runs when the parameters have changed, before hyperpodrun's own hook takes the step for complete.
        optimizer.register_step_post_hook(lambda *_: self.reach("optimizer"))

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
                injection.fire()
