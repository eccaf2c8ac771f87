"""The steps of training in Lightning's loops, and the way back into the middle of them.

A step ends where a batch has been trained on: optimizer and schedulers have moved, and nothing else has happened.
So what Lightning does then (hooks, validation, checkpoints, the end of an epoch) belongs to the step that follows, and
a fault in it finds every rank whole. A restarted trainer fetches the batch again, leaves out training on it, puts its
position there, and goes on with what follows.

Methods of the two loops are replaced on the objects of this one fit. Names and order are Lightning's of 2.5 and 2.6.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from ...checkpointless.errors import UnsupportedStateError
from ...checkpointless.manager import CheckpointManager
from ...checkpointless.step.loaders import STARTS
from .position import Position, started

_WITHOUT_END = 1 << 62


class Steps:
    """Of one fit."""

    def __init__(self, trainer: Any, manager: CheckpointManager, position: Position) -> None:
        self._trainer = trainer
        self._manager = manager
        self._position = position
        self._left: Iterator[int] | None = None
        self._update = contextlib.ExitStack()
        self._open = False
        """An update is under way."""
        self._resuming = False
        fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        self._replace(loop, "advance", self._advance)
        self._replace(loop, "on_run_start", self._begin_epoch)
        self._replace(loop, "update_lr_schedulers", self._move_schedulers)
        self._replace(fit, "on_run_end", self._end)

    def resume(self) -> None:
        """The position is known, and is not the beginning."""
        trainer = self._trainer
        self._resuming = True
        fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        trainer.num_sanity_val_steps = 0
        given = self._position.given
        if trainer.datamodule is not None and given is not None and given["data"]:
            trainer.datamodule.load_state_dict(given["data"])
        # What was loaded from a checkpoint is older than what was restored.
        connector = trainer._checkpoint_connector
        connector._loaded_checkpoint = {}
        connector._restore_modules_and_callbacks = lambda *_, **__: None
        connector.restore_training_state = lambda: None
        self._replace(fit, "run", self._run)
        self._replace(fit, "on_run_start", self._begin_run)
        self._replace(loop, "reset", self._reset)
        for way in (loop.automatic_optimization, loop.manual_optimization):
            self._replace(way, "run", self._train_on_batch)

    def update_begins(self) -> None:
        """An optimizer is about to step; what follows until the schedulers have moved is one update."""
        if self._trainer.lightning_module.automatic_optimization and not self._open:
            self._open = True
            self._update.enter_context(self._manager.update())

    def leave(self, error: BaseException) -> None:
        """The fit is left by an exception."""
        self._update.__exit__(type(error), error, error.__traceback__)

    def _replace(self, target: Any, name: str, by: Callable[..., Any]) -> None:
        setattr(target, name, functools.partial(by, getattr(target, name)))

    # ---- in every run ----------------------------------------------------------------------------------------------

    def _begin_epoch(self, original: Callable[..., None], fetcher: Any) -> None:
        position, loop = self._position, self._trainer.fit_loop.epoch_loop
        if self._resuming:
            self._fetch_to_here(fetcher)
            return
        early = self._trainer.current_epoch == 0 or loop.restarting or self._trainer.fit_loop.restarting
        position.early = early or bool(getattr(self._trainer.fit_loop, "is_resuming", False))
        original(fetcher)
        position.base = loop.batch_progress.current.ready
        if self._left is None:
            position.offset = loop.batch_progress.total.ready
            self._begin_steps()
            position.live = True

    def _begin_steps(self) -> None:
        self._left = self._manager.steps(_WITHOUT_END)
        step = next(self._left)
        self._check(step)

    def _check(self, step: int) -> None:
        here = self._trainer.fit_loop.epoch_loop.batch_progress.total.ready - self._position.offset
        if step != here:
            raise UnsupportedStateError(
                f"Lightning's trainer is at batch {here} and step {step} is due: fit() must be called once in each "
                "entry of the function"
            )

    def _advance(self, original: Callable[..., None], fetcher: Any) -> None:
        if not self._resuming:
            self._position.loaders = self._states_of_loaders()
            self._position.starts = STARTS.under_way()
            self._position.output = None
            self._position.pending = True
        original(fetcher)

    def _states_of_loaders(self) -> list[Any]:
        """Of those that can be put where they were; the others begin their epoch again and skip."""
        combined = self._trainer.fit_loop._combined_loader
        return list(combined._state_dicts()) if self._has_states(combined) else []

    @staticmethod
    def _has_states(combined: Any) -> bool:
        return all(
            hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict") for loader in combined.flattened
        )

    def _move_schedulers(self, original: Callable[..., None], interval: str, update_plateau_schedulers: bool) -> None:
        """Called in every batch for the schedulers of steps, and then, in an epoch's last one, for those of epochs."""
        loop = self._trainer.fit_loop.epoch_loop
        within = loop.batch_progress.total.completed < loop.batch_progress.total.ready and not update_plateau_schedulers
        if not (self._resuming and within):
            original(interval, update_plateau_schedulers)
        if within and interval == ("epoch" if loop._num_ready_batches_reached() else "step"):
            self._end_step()

    def _end_step(self) -> None:
        position = self._position
        if self._resuming:
            self._resuming = False
            position.apply()
            self._begin_steps()
            self._manager.settle()
            position.applied()
            return
        position.pending = False
        self._open = False
        self._update.close()
        assert self._left is not None
        self._check(next(self._left))

    def _end(self, original: Callable[[], None]) -> None:
        original()
        self._manager.end_steps()

    # ---- in a restarted one, up to its first step ------------------------------------------------------------------

    def _run(self, original: Callable[[], None]) -> None:
        self._position.apply_epoch()
        original()

    def _begin_run(self, original: Callable[[], None]) -> None:
        original()
        if self._resuming:
            self._position.apply_epoch()
            fit = self._trainer.fit_loop
            stages = importlib.import_module(type(fit).__module__).RestartStage
            fit._restart_stage = stages.RESTARTED_MID_EPOCH

    def _reset(self, original: Callable[[], None]) -> None:
        if self._resuming:
            self._position.apply_batch()
        else:
            original()

    def _fetch_to_here(self, fetcher: Any) -> None:
        """The epoch's iterator is begun again, and stands before the batch under way."""
        position, loop = self._position, self._trainer.fit_loop.epoch_loop
        given = position.given
        assert given is not None
        fetcher._start_profiler, fetcher._stop_profiler = loop._on_before_fetch, loop._on_after_fetch
        combined = self._trainer.fit_loop._combined_loader
        ready = loop.batch_progress.current.ready
        if given["loaders"]:
            combined._load_state_dicts(given["loaders"])
            iter(fetcher)
            fetcher.fetched += ready
            return
        if given["starts"]:
            STARTS.repeats(started(given))
        if given["early"]:
            self._tell_samplers(0)
        iter(fetcher)
        self._tell_samplers(self._trainer.fit_loop.epoch_progress.current.processed)
        _, base = given["base"]
        for _ in range(ready - base):
            next(fetcher)
        fetcher.fetched += base

    def _tell_samplers(self, epoch: int) -> None:
        fit = self._trainer.fit_loop
        tell = importlib.import_module(type(fit).__module__)._set_sampler_epoch
        for loader in fit._combined_loader.flattened:
            tell(loader, epoch)

    def _train_on_batch(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What training on the batch gave."""
        if not self._resuming:
            return original(*args, **kwargs)
        given = self._position.given
        assert given is not None
        output = given["output"]
        if output is None:
            return {}
        if not self._trainer.lightning_module.automatic_optimization:
            return output if isinstance(output, dict) else {"loss": output}
        return self._scaled(output)

    def _scaled(self, output: Any) -> dict[str, Any]:
        """As hooks get it: the loss is divided by the number of batches of an update."""
        extra = dict(output) if isinstance(output, dict) else {"loss": output}
        return {**extra, "loss": extra["loss"] / self._trainer.accumulate_grad_batches}
