"""Where Lightning's trainer is, as plain values: what its loops, callbacks, loggers and results are at a step's end.

Registered with the checkpoint manager beside the module and its optimizers, so it is noted at every step and comes back
to its own rank. A step ends within a batch, when the optimizer and what belongs to it has moved; what follows, hooks,
validation and checkpoints, is part of the next one (`steps.py`). From the backward pass on nothing of it is unknown:
what is counted after that is foreseen here. So a rank that dies there is replaced without going back.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from ...checkpointless.state.stateful import own_copy, same
from ...checkpointless.step.loaders import Starts
from .files import Files
from .loggers import rows_of
from .plain import plain, relocated
from .results import read_metrics, read_results, write_metrics, write_results

_log = logging.getLogger("hyperpodrun.integrations")
_LARGEST_OUTPUT = 64 << 10
"""So many bytes of a tensor that `training_step` returns are noted; a larger one is not given to `on_train_batch_end`
of the first batch after a restart."""
_DIRECTORY = "<dirpath>"


class Position:
    """Of one trainer. Empty until its first step begins: a restart of that begins from the beginning."""

    def __init__(self, trainer: Any, files: Files) -> None:
        self._trainer = trainer
        self._files = files
        self._rows: list[Any] = []
        self._given: dict[str, Any] | None = None
        """What a restart has brought, until it has been applied."""
        self.live = False
        self.pending = False
        """A batch is under way whose step has not ended."""
        self.output: Any = None
        """What `training_step` gave for this batch."""
        self.loaders: list[Any] = []
        """The states of loaders that have one, before this batch was fetched."""
        self.starts: Starts = ()
        """What this batch's iterators drew from when they began. Noted in an epoch's last batch only: before it, it is
        noted anyway (`checkpointless/step/loaders.py`)."""
        self.offset = 0
        """Batches that were done before this job's first step: it goes on from a checkpoint."""
        self.early = False
        """The epoch's iterator began before its samplers were told the epoch, as it does when the trainer begins."""
        self.base = 0
        """Batches of the epoch that were done when its iterator began."""

    def state_dict(self) -> dict[str, Any]:
        if self._given is not None:
            return self._given
        return self._read() if self.live else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._given = state or None

    @property
    def given(self) -> dict[str, Any] | None:
        return self._given

    def begins(self) -> None:
        """The loggers are there."""
        self._rows = rows_of(self._trainer)

    # ---- reading ---------------------------------------------------------------------------------------------------

    def _read(self) -> dict[str, Any]:
        trainer, fit = self._trainer, self._trainer.fit_loop
        loop = fit.epoch_loop
        connector = trainer._logger_connector
        module, data = trainer.lightning_module, trainer.datamodule
        return {
            "progress": self._read_progress(),
            "reloaded": float(fit._last_train_dl_reload_epoch),
            "stepped": loop._batches_that_stepped,
            "stop": trainer.should_stop,
            "metrics": [
                dict(found)
                for found in (connector._callback_metrics, connector._logged_metrics, connector._progress_bar_metrics)
            ],
            "logging": [connector._first_loop_iter, connector._current_fx],
            "results": read_results(loop._results),
            "torchmetrics": read_metrics(module),
            "callbacks": [_read_callback(callback) for callback in trainer.callbacks],
            "data": plain(data.state_dict(), type(data).__name__) if data is not None else {},
            "loaders": self.loaders,
            "starts": [list(start) for start in self.starts] if loop._num_ready_batches_reached() else [],
            "base": [self.offset, self.base],
            "early": self.early,
            "output": self.output,
            "rows": [rows.read() for rows in self._rows],
            "files": self._files.read(),
        }

    def _read_progress(self) -> dict[str, Any]:
        fit = self._trainer.fit_loop
        loop = fit.epoch_loop
        batch = loop.batch_progress
        optimizer = loop.automatic_optimization.optim_progress.optimizer
        ahead = self._schedulers_to_move() if self.pending else 0
        moved = loop.scheduler_progress
        return {
            "epoch": fit.epoch_progress.state_dict(),
            "batch": [batch.total.ready, batch.current.ready, batch.is_last_batch],
            "optimizer": [optimizer.step.total.ready, optimizer.step.current.ready],
            "zero_grad": optimizer.zero_grad.state_dict(),
            "scheduler": [moved.total.ready + ahead, moved.current.ready + ahead],
            "manual": loop.manual_optimization.optim_step_progress.state_dict(),
            "validation": loop.val_loop.batch_progress.state_dict(),
        }

    def _schedulers_to_move(self) -> int:
        """How many will in the batch under way."""
        trainer = self._trainer
        loop = trainer.fit_loop.epoch_loop
        if not trainer.lightning_module.automatic_optimization:
            return 0
        places = {} if loop._should_accumulate() else {"step": loop.batch_idx + 1}
        if loop._num_ready_batches_reached():
            places["epoch"] = trainer.current_epoch + 1
        return sum(
            not config.reduce_on_plateau
            and config.interval in places
            and not places[config.interval] % config.frequency
            for config in trainer.lr_scheduler_configs
        )

    # ---- writing ---------------------------------------------------------------------------------------------------

    def apply_epoch(self) -> None:
        """The epoch, before its loaders are made."""
        assert self._given is not None
        self._trainer.fit_loop.epoch_progress.load_state_dict(own_copy(self._given["progress"]["epoch"]))

    def apply_batch(self) -> None:
        """The batch under way, as it was before it was fetched."""
        assert self._given is not None
        batch = self._trainer.fit_loop.epoch_loop.batch_progress
        total, current, _ = self._given["progress"]["batch"]
        for tracker, count in ((batch.total, total), (batch.current, current)):
            tracker.ready = tracker.started = tracker.processed = tracker.completed = count - 1
        batch.is_last_batch = False

    def apply(self) -> None:
        """All of it; the trainer stands at the end of the step."""
        state = own_copy(self._given)
        trainer, fit = self._trainer, self._trainer.fit_loop
        loop = fit.epoch_loop
        self.apply_progress(state["progress"])
        fit._last_train_dl_reload_epoch = state["reloaded"]
        loop._batches_that_stepped = state["stepped"]
        trainer.should_stop = state["stop"]
        connector = trainer._logger_connector
        connector._callback_metrics, connector._logged_metrics, connector._progress_bar_metrics = state["metrics"]
        connector._first_loop_iter, connector._current_fx = state["logging"]
        write_results(loop._results, state["results"], trainer)
        write_metrics(trainer.lightning_module, state["torchmetrics"])
        for callback, values in zip(trainer.callbacks, state["callbacks"], strict=True):
            _write_callback(callback, values)
        self.starts = started(state)
        self.loaders, self.output = state["loaders"], state["output"]
        self.offset, self.base = state["base"]
        self.early = state["early"]
        for rows, values in zip(self._rows, state["rows"], strict=True):
            rows.write(values)
        self._files.write(state["files"])

    def applied(self) -> None:
        """The step that follows has begun."""
        told, self._given = self._given, None
        self.live, self.pending = True, False
        assert told is not None
        found = self._read()
        other = [name for name in told if not same(told[name], found.get(name))]
        if other:
            _log.warning("after the restart %s of Lightning's trainer is not what it was", ", ".join(other))

    def apply_progress(self, state: dict[str, Any]) -> None:
        fit = self._trainer.fit_loop
        loop = fit.epoch_loop
        fit.epoch_progress.load_state_dict(state["epoch"])
        batch = loop.batch_progress
        total, current, batch.is_last_batch = state["batch"]
        for tracker, count in ((batch.total, total), (batch.current, current)):
            tracker.ready = tracker.started = tracker.processed = count
            tracker.completed = count - 1
        optimizer = loop.automatic_optimization.optim_progress.optimizer
        _count(optimizer.step, state["optimizer"])
        optimizer.zero_grad.load_state_dict(state["zero_grad"])
        _count(loop.scheduler_progress, state["scheduler"])
        loop.manual_optimization.optim_step_progress.load_state_dict(state["manual"])
        loop.val_loop.batch_progress.load_state_dict(state["validation"])

    def note_output(self, output: Any) -> None:
        """`training_step` has returned this."""
        self.output = _small(output)


def started(state: dict[str, Any]) -> Starts:
    """The beginnings of iterators that a position has noted."""
    return tuple((what, drawn) for what, drawn in state["starts"])


def _count(progress: Any, counts: list[int]) -> None:
    for tracker, count in zip((progress.total, progress.current), counts, strict=True):
        tracker.ready = tracker.completed = count


_CHECKPOINT_FIELDS = (
    "_last_global_step_saved",
    "_last_checkpoint_saved",
    "current_score",
    "_defer_save_until_validation",
)


def _read_callback(callback: Any) -> dict[str, Any]:
    state = callback.state_dict()
    if is_model_checkpoint(callback):
        state = {name: value for name, value in state.items() if name != "dirpath"}
        state |= {name: getattr(callback, name) for name in _CHECKPOINT_FIELDS if hasattr(callback, name)}
        if callback.dirpath:
            state = relocated(state, str(callback.dirpath), _DIRECTORY)
    return dict(plain(state, f"callback {type(callback).__name__}"))


def _write_callback(callback: Any, state: dict[str, Any]) -> None:
    if is_model_checkpoint(callback):
        state = relocated(state, _DIRECTORY, str(callback.dirpath))
        fields = {name: state.pop(name) for name in _CHECKPOINT_FIELDS if name in state}
        callback.load_state_dict({**state, **fields, "dirpath": callback.dirpath})
        for name, value in fields.items():
            setattr(callback, name, value)
    elif state:
        callback.load_state_dict(state)


def is_model_checkpoint(callback: Any) -> bool:
    return any(kind.__name__ == "ModelCheckpoint" for kind in type(callback).__mro__)


def _small(output: Any) -> Any:
    """What hooks after the step are given, less what is large or no value."""
    if isinstance(output, torch.Tensor):
        return output.detach().clone() if output.nbytes <= _LARGEST_OUTPUT else None
    if isinstance(output, dict):
        return {str(name): _small(value) for name, value in output.items()}
    return output if isinstance(output, bool | int | float | str) else None
