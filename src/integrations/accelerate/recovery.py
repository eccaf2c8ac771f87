"""One recoverable function: its manager, the objects of its loop, and where all ranks go on after a fault."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import distributed as dist

from ...checkpointless.errors import UnsupportedStateError
from ...checkpointless.manager import CheckpointManager
from ...checkpointless.state.generators import States, write_generators
from ...checkpointless.step.loaders import STARTS
from .place import Place, Values


class Recovery:
    """Of one function, for as long as the process lives; `entered` in each of its entries."""

    def __init__(self, manager: CheckpointManager) -> None:
        self.manager = manager
        self.place = Place()
        self.told: Counter[Any] = Counter()
        """What loggers have been told in earlier entries: how often each thing."""
        self.telling: Counter[Any] = Counter()
        """What they would have been told in this one."""
        self._trains = ""
        self.generators: States = {}
        """Those with which to go on."""
        self.step = 0
        """The step to go on with."""
        self.repeats = False
        """What followed the update before that step is done again."""

    def entered(self) -> None:
        """The function is entered, or entered again: no loop has begun."""
        self.place = Place()
        self.told |= self.telling
        self.telling = Counter()
        self._trains = ""
        self.step, self.repeats = 0, False

    @property
    def started(self) -> bool:
        """The loop of this function has been restored."""
        return bool(self._trains)

    def start(self, trains: str, device: torch.device, **objects: Any) -> int:
        """Registers, restores, and has all ranks agree on whether the step has begun; the step to go on with.

        `trains`: what does, for a sentence. To be called before accelerate wraps the model.
        """
        if self._trains:
            raise UnsupportedStateError(
                f"{trains} begins a second training in a recoverable function, after {self._trains}: a fault in it "
                "would train the first one again; give each a function of its own"
            )
        for target in objects.values():
            if isinstance(target, torch.nn.Module) and "_original_forward" in vars(target):
                vars(target).pop("forward", None)  # accelerate's, of an earlier entry
                del target._original_forward
        self.manager.register(**objects, place=self.place)
        self.step = self.manager.restore()
        self._trains = trains
        noted = self.manager.noted()
        self.repeats = self.step > 0 and not _all(noted.begun, device)
        shared, mine = self.at()
        del shared
        self.generators = mine.get("generators", noted.generators) if self.repeats else noted.generators
        return self.step

    def at(self) -> tuple[Values, Values]:
        """Shared and own values of the place to go on from."""
        return self.place.at(repeats=self.repeats)

    def repeat(self) -> None:
        """What followed the update is about to be done again, with the random numbers of the first time."""
        write_generators(self.generators)
        STARTS.repeats(())

    def repeated(self, generators: States) -> None:
        """It has been done; the step begins with these generators."""
        self.generators = generators

    def skips(self, start: States | None) -> None:
        """The loader that was under way is about to begin again. `start`: the generators with which it began. (Those
        of `step/loaders.py` are not there any more while accelerate holds the last batch back.)"""
        STARTS.repeats(())
        if start is not None:
            write_generators(start)

    def arrived(self) -> None:
        """The loop is where it was when the step began."""
        write_generators(self.generators)


def _all(value: bool, device: torch.device) -> bool:
    """Whether it is true on all ranks."""
    if not dist.is_initialized():
        return value
    flag = torch.tensor([int(value)], device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


_current: Recovery | None = None


def current() -> Recovery | None:
    """The recovery of the function that is being run."""
    return _current


def make_current(recovery: Recovery | None) -> None:
    global _current
    _current = recovery
