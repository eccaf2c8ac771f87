"""Faults on demand: `--inject KIND:rank=R,step=S[,where=PLACE]` breaks this job on purpose, once per option.

Which faults have already fired must be known without memory, because the process that remembers may be the one
that dies. The rule: the injections are sorted into *events*, and event n fires in epoch n only. An event ends its
epoch, so the epoch's number says how many have fired, to a re-entered process and to a respawned one alike.

Injections on different ranks at the same point of the same step are one event; the same rank named there again
is a further one. `optimizer` and `between` are one point: no collective separates them, so both do fire.

An injection therefore never fires twice. It does fire if the injections are the job's only faults: a foreign
fault uses up an epoch's number, and an event that the job never reaches holds up those behind it.
"""

import argparse
import collections
import ctypes
import faulthandler
import os
import re
import signal
import sys
from dataclasses import dataclass

import torch

from model import GPT

KINDS = ("raise", "kill", "segv", "exit")
PLACES = {"forward": 0, "backward": 1, "optimizer": 2, "between": 2}  # name: its point within a step
_SYNTAX = re.compile(rf"({'|'.join(KINDS)}):rank=(\d+),step=(\d+)(?:,where=({'|'.join(PLACES)}))?")


class InjectedFault(RuntimeError):
    """What `raise` raises."""


@dataclass(frozen=True)
class Injection:
    """One `--inject` option."""

    kind: str
    rank: int
    step: int
    where: str = "forward"

    @classmethod
    def parse(cls, text: str) -> "Injection":
        """Read the option's value; argparse reports what is wrong with it."""
        match = _SYNTAX.fullmatch(text)
        if not match:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not KIND:rank=R,step=S[,where=PLACE] with KIND one of {', '.join(KINDS)} "
                f"and PLACE one of {', '.join(PLACES)}."
            )
        kind, rank, step, where = match.groups()
        return cls(kind, int(rank), int(step), where or "forward")

    def fire(self) -> None:
        """Break this process."""
        print(f"rank {self.rank}: injecting {self.kind} in step {self.step}, {self.where}", file=sys.stderr, flush=True)
        if self.kind == "raise":
            raise InjectedFault(f"rank {self.rank}, step {self.step}, {self.where}")
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "segv":
            faulthandler.disable()
            ctypes.string_at(0)
        os._exit(3)


class FaultInjector:
    """Fires the injections that are due. The train loop keeps `step` up to date."""

    def __init__(self, injections: list[Injection]) -> None:
        self.step = self.rank = self.epoch = 0
        self._events: list[tuple[int, Injection]] = []
        order = sorted(injections, key=lambda i: (i.step, PLACES[i.where]))
        named: collections.Counter[tuple[int, int, int]] = collections.Counter()
        keys = []
        for i in order:
            point = (i.step, PLACES[i.where])
            keys.append((*point, named[*point, i.rank]))
            named[*point, i.rank] += 1
        numbers = {key: n for n, key in enumerate(sorted(set(keys)))}
        self._events = [(numbers[key], i) for key, i in zip(keys, order, strict=True)]

    def attach(self, model: GPT, optimizer: torch.optim.Optimizer) -> None:
        """Reach into the step: without injections nothing is hooked."""
        if not self._events:
            return
        middle = model.blocks[len(model.blocks) // 2]
        middle.register_forward_pre_hook(lambda *_: self.reach("forward"))
        # The first block's gradient comes late in backward: the later layers' buckets are being reduced.
        model.blocks[0].qkv.weight.register_hook(lambda _: self.reach("backward"))
        # Runs with the parameters changed and before hyperpodrun's own, global hook has counted the step.
        optimizer.register_step_post_hook(lambda *_: self.reach("optimizer"))

    def begin(self, epoch: int, rank: int) -> None:
        """An epoch starts; torchrun's restarts count as epochs too."""
        self.epoch = max(epoch, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
        self.rank = rank

    def reach(self, where: str) -> None:
        """The job is at this place of the step: fire what is due here."""
        for event, injection in self._events:
            due = (injection.rank, injection.step, injection.where) == (self.rank, self.step, where)
            if due and event == self.epoch:
                injection.fire()
