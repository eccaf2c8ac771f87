"""One call of `Trainer.train()` in a recoverable function: its steps, and where it goes on after a fault.

A step is one update, with all the batches of its accumulation window. What the Trainer does after an update (logging,
evaluation, saving, the end of an epoch) lies between two steps: it is done once, and done again as a whole only where a
fault found a rank that was not through with it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl

from ...checkpointless.errors import UnsupportedStateError
from ...checkpointless.state.generators import read_generators, write_generators
from ..accelerate.place import Values
from ..accelerate.recovery import Recovery
from ..accelerate.teaching import refuse
from .state import History, read_shared, write_shared

RESUMED = "hyperpodrun: the interrupted step"
"""Stands where the Trainer expects the checkpoint it resumes from."""


class Training:
    """Made when the loop's length is known; it is over when the Trainer is."""

    def __init__(self, recovery: Recovery, trainer: Trainer, begins: tuple[int, int]) -> None:
        self.recovery = recovery
        self.arriving = False
        """The loop has yet to get to the step that is due."""
        self.inside = False
        """A step is under way."""
        self.epoch, self.begins = begins[0], begins
        self.loader: Any = None
        self._trainer = trainer
        self._manager = recovery.manager
        self._history = History()
        self._step = self._skip = 0
        self._done = begins[1]
        """Batches of this epoch that have been trained with."""
        self._followed = False
        """Something has been done since the last step."""
        self._block: contextlib.AbstractContextManager[None] | None = None
        self._pending: Values = {}
        self._flos = 0.0
        self._fetch: Any = None
        self._start: Any = None
        """The generators with which the iterator of this epoch began: it draws the seeds of its workers."""
        self._order: Any = None
        self._last: tuple[float | None, float | None] = None, None
        """Norm of the gradients and learning rate of the last update, for the log that follows it."""
        self._generators: Any = None

    # ---- to where it goes on ---------------------------------------------------------------------------------------

    def start(self, max_steps: int) -> tuple[int, int]:
        """Makes optimizer and scheduler, restores everything; epoch and batches of it that are done."""
        trainer = self._trainer
        _refuse(trainer)
        if trainer._created_lr_scheduler:
            trainer.lr_scheduler, trainer._created_lr_scheduler = None, False
        trainer.create_optimizer()
        trainer.create_scheduler(num_training_steps=max_steps, optimizer=trainer.optimizer)
        trainer._created_lr_scheduler = False  # or it would be made anew
        objects: dict[str, Any] = {
            "model": trainer.model,
            "optimizer": trainer.optimizer,
            "scheduler": trainer.lr_scheduler,
        }
        if trainer.accelerator.scaler is not None:
            objects["scaler"] = trainer.accelerator.scaler
        self._step = self.recovery.start("Trainer.train()", trainer.args.device, **objects)
        trainer.add_callback(_update_begins(self))
        _before_backward(trainer.accelerator, self.foresee)
        if self._step == 0:
            return self.begins
        self.arriving = True
        shared, _ = self.recovery.at()
        self.epoch, self._done = shared["epoch_index"], shared["done"]
        self.begins = tuple(shared["begins"])
        return self.epoch, self._done

    def put_back(self) -> Values:
        """The Trainer is what it was; what it knew of the last update."""
        trainer = self._trainer
        shared, mine = self.recovery.at()
        write_shared(trainer, shared)
        trainer._tr_loss = mine["tr_loss"].to(trainer.args.device)
        trainer.current_flos = mine["flos"]
        self._order, self._start, self._fetch = mine["order"], mine["start"], mine["fetch"]
        self.recovery.place.settle(shared, {name: value for name, value in mine.items() if name != "generators"})
        self._generators = self.recovery.generators
        self._last = shared["grad_norm"], shared["learning_rate"]
        return shared

    def arrive(self, iterator: Iterator[Any]) -> None:
        """The iterator over an epoch's batches goes to the one that is due."""
        _, mine = self.recovery.at()
        skip = self._done - self._offset()
        self.recovery.skips(mine["start"] if skip else None)
        for number in range(skip):
            if number == skip - 1 and mine["fetch"] is not None:
                write_generators(mine["fetch"])
            next(iterator)
        self.recovery.arrived()
        self.arriving = False

    def _offset(self) -> int:
        """Batches of this epoch that were trained with before this run."""
        return self.begins[1] if self.epoch == self.begins[0] else 0

    def set_order(self) -> None:
        """An epoch begins: its order is drawn from the generator that accelerate keeps in step on all ranks."""
        generator = self._generator()
        if self.arriving and self._order is not None and generator is not None:
            generator.set_state(self._order)
        self._order = None if generator is None else generator.get_state()

    def passes_order(self) -> None:
        """The epoch that is due was drawn, and its batches are done."""
        _, mine = self.recovery.at()
        generator = self._generator()
        if generator is not None and mine["order_after"] is not None:
            generator.set_state(mine["order_after"])

    def _generator(self) -> Any:
        return getattr(self.loader, "synchronized_generator", None)

    # ---- a step ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        if self._followed:
            self._followed = False
            place = self.recovery.place
            if self._step:
                place.follow(self._shared(), self._mine(), {"generators": self._generators})
        self._manager.begin_step(self._step, settled=True)
        self.inside = True
        if self._done == self._offset():
            self._start = dict(read_generators())

    def fetched(self, batches: int, generators: Any) -> None:
        """The window has its batches. `generators`: as the last of them found them."""
        self._done += batches
        self._fetch = generators

    def computes(self, flos: float) -> None:
        """A batch is about to be computed."""
        self._flos = flos

    def foresee(self, loss: torch.Tensor) -> None:
        """A backward pass is about to begin: what this rank knows of the window when it is over."""
        trainer = self._trainer
        total = trainer._tr_loss
        if trainer.args.logging_nan_inf_filter and not bool(torch.isfinite(loss)):
            total = total + total / (1 + trainer.state.global_step - trainer._globalstep_last_logged)
        else:
            total = total + loss
        mine = self._mine() | {"tr_loss": total, "flos": trainer.current_flos + self._flos}
        self.recovery.place.foresee(mine)

    def update_begins(self) -> None:
        self._block = self._manager.update()
        self._block.__enter__()

    def end(self, grad_norm: Any, learning_rate: Any) -> None:
        """The update is complete, and nothing has followed it yet."""
        self._last = _number(grad_norm), _number(learning_rate)
        self.recovery.place.settle(self._shared(), self._mine())
        if self._block is not None:
            self._block.__exit__(None, None, None)
            self._block = None
        self._manager.end_step()
        self.inside = False
        self._step += 1
        self._generators = dict(read_generators())

    def follows(self) -> None:
        """Something is about to be done between two steps."""
        control: TrainerControl = self._trainer.control
        self._followed |= control.should_log or control.should_evaluate or control.should_save

    def epoch_begins(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self._done, self._followed = epoch, 0, True

    def _shared(self) -> Values:
        values = read_shared(self._trainer, self._history)
        return values | {
            "epoch_index": self.epoch,
            "done": self._done,
            "begins": list(self.begins),
            "grad_norm": self._last[0],
            "learning_rate": self._last[1],
        }

    def _mine(self) -> Values:
        generator = self._generator()
        return {
            "order_after": None if generator is None else generator.get_state(),
            "tr_loss": self._trainer._tr_loss.detach().clone(),
            "flos": self._trainer.current_flos,
            "fetch": self._fetch,
            "start": self._start,
            "order": self._order,
        }


def _number(value: Any) -> float | None:
    return value.item() if isinstance(value, torch.Tensor) else value


def _refuse(trainer: Trainer) -> None:
    """What is not recovered yet."""
    refuse(trainer.accelerator)
    if trainer.args.auto_find_batch_size:
        raise UnsupportedStateError(
            "auto_find_batch_size=True trains anew within one call of train(): find the batch size in a run of its own"
        )
    if isinstance(trainer.train_dataset, IterableDataset) and not math.isfinite(_length(trainer.train_dataset)):
        raise UnsupportedStateError(
            "the training data set has no length, so its place cannot be found again: use one with __len__"
        )


def _length(dataset: Any) -> float:
    try:
        return float(len(dataset))
    except TypeError:
        return math.inf


def _update_begins(training: Training) -> Any:
    def on_pre_optimizer_step(*_: Any, **__: Any) -> None:
        training.update_begins()

    return type("UpdateBegins", (TrainerCallback,), {"on_pre_optimizer_step": on_pre_optimizer_step})()


def _before_backward(accelerator: Any, tell: Any) -> None:
    backward = accelerator.backward

    def told(loss: torch.Tensor, **settings: Any) -> None:
        tell(loss.detach())
        backward(loss, **settings)

    accelerator.backward = told
