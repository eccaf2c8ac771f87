"""transformers.Trainer's methods ask, from the first recoverable function on, whether there is a recovery.

Owned: what is replaced in the class, once per process; classes made from it, by a user or by trl, inherit that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from transformers import Trainer, trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ...checkpointless.errors import UnsupportedStateError
from ...checkpointless.state.generators import read_generators
from ..accelerate import teaching as accelerate_teaching
from ..accelerate.recovery import current
from .training import RESUMED, Training

_NEEDED = ("_init_training_state", "_run_epoch", "get_batch_samples", "_maybe_log_save_evaluate", "training_step")


@functools.cache
def teach() -> None:
    """Once. Raises UnsupportedStateError for a release of transformers whose loop has other parts."""
    missing = [name for name in _NEEDED if not hasattr(Trainer, name)]
    if missing:
        import transformers

        raise UnsupportedStateError(
            f"transformers {transformers.__version__} has no Trainer.{missing[0]}, by which its loop is recovered; "
            "install a release that pip install 'hyperpodrun[hf]' accepts"
        )
    accelerate_teaching.teach()
    for method in (_init_training_state, _run_epoch, get_batch_samples, training_step, _maybe_log_save_evaluate, log):
        _replace(method.__name__, method)
    for name in ("_load_rng_state", "_load_optimizer_and_scheduler", "_load_scaler"):
        _replace(name, _load)
    skip = trainer.skip_first_batches

    def skip_first_batches(loader: Any, count: int = 0) -> Any:
        training = _skipping
        if training is None:
            return skip(loader, count)
        begun = training.begins
        return skip(loader, begun[1]) if training.epoch == begun[0] and begun[1] else loader

    trainer.skip_first_batches = skip_first_batches


def _replace(name: str, method: Callable[..., Any]) -> None:
    original = getattr(Trainer, name)

    @functools.wraps(original)
    def replaced(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        return method(self, original, *args, **kwargs)

    setattr(Trainer, name, replaced)


def _training(self: Trainer) -> Training | None:
    training: Training | None = self.__dict__.get("_hyperpodrun")
    return training if training is not None and training.recovery is current() else None


_skipping: Training | None = None
"""The one whose epoch is about to begin in the midst."""


def _init_training_state(
    self: Trainer, original: Any, max_steps: int, per_epoch: int, epochs: int, resume: Any, trial: Any
) -> tuple[int, int]:
    begins: tuple[int, int] = original(self, max_steps, per_epoch, epochs, resume, trial)
    recovery = current()
    if recovery is None:
        return begins
    if trial is not None:
        raise UnsupportedStateError("a search of hyperparameters has many trainings, and only one can be recovered")
    training = self._hyperpodrun = Training(recovery, self, begins)
    position = training.start(max_steps)
    if training.arriving:
        self.args.eval_on_start = False  # it was before the first step
    return position


def _run_epoch(self: Trainer, original: Any, **given: Any) -> None:
    global _skipping
    training = _training(self)
    if training is None:
        original(self, **given)
        return
    training.loader = given["train_dataloader"]
    if not training.arriving:
        training.epoch_begins(given["epoch"])
        training.set_order()
        original(self, **given)
        return
    shared = training.put_back()
    over = shared["done"] >= given["steps_in_epoch"]
    if training.recovery.repeats:
        training.recovery.repeat()
        training.follows()
        told = {name: given[name] for name in ("model", "trial", "epoch", "ignore_keys_for_eval", "start_time")}
        told |= {"grad_norm": shared["grad_norm"], "learning_rate": shared["learning_rate"]}
        self._maybe_log_save_evaluate(self._tr_loss, **told)
        control = self.control
        if over or control.should_epoch_stop or control.should_training_stop:
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self._maybe_log_save_evaluate(self._tr_loss, **told)
            training.passes_order()
            training.arriving = False
            return
        training.recovery.repeated(dict(read_generators()))
    training.set_order()
    given |= {"resume_from_checkpoint": RESUMED, "epochs_trained": given["epoch"]}
    given["steps_trained_in_current_epoch"] = shared["done"]
    ignored, self.args.ignore_data_skip, _skipping = self.args.ignore_data_skip, False, training
    try:
        original(self, **given)
    finally:
        self.args.ignore_data_skip, _skipping = ignored, None


def get_batch_samples(self: Trainer, original: Any, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
    training = _training(self)
    if training is None:
        return original(self, epoch_iterator, num_batches, device)
    if training.arriving:
        training.arrive(epoch_iterator)
    training.begin()
    watched = _Watched(epoch_iterator, num_batches if self.args.dataloader_num_workers == 0 else 0)
    batches, items = original(self, watched, num_batches, device)
    training.fetched(len(batches), watched.generators)
    return batches, items


class _Watched:
    """An iterator that notes what its `last` item finds in the random generators: without workers a batch is made in
    this process, one ahead."""

    def __init__(self, iterator: Iterator[Any], last: int) -> None:
        self.generators: Any = None
        self._iterator = iterator
        self._left = last

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._left -= 1
        if self._left == 0:
            self.generators = dict(read_generators())
        return next(self._iterator)


def training_step(self: Trainer, original: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    training = _training(self)
    if training is not None:
        training.computes(float(self.floating_point_ops(inputs)))
    return original(self, model, inputs, *args, **kwargs)


def _maybe_log_save_evaluate(
    self: Trainer,
    original: Any,
    tr_loss: Any,
    grad_norm: Any,
    model: Any,
    trial: Any,
    epoch: Any,
    ignore_keys_for_eval: Any,
    start_time: float,
    learning_rate: Any = None,
) -> None:
    training = _training(self)
    if training is not None:
        if training.inside:
            training.end(grad_norm, learning_rate)
        training.follows()
    given = (tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time)
    original(self, *given, learning_rate=learning_rate)


def log(self: Trainer, original: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
    """A log that is repeated goes into the history, which was put back, and not to loggers that have had it."""
    training = _training(self)
    if training is None:
        original(self, logs, *args, **kwargs)
        return
    recovery, what = training.recovery, (self.state.global_step, *sorted(logs))
    recovery.telling[what] += 1
    handler = self.callback_handler
    callbacks = handler.callbacks
    if recovery.telling[what] <= recovery.told[what]:
        handler.callbacks = [callback for callback in callbacks if not _is_logger(callback)]
    try:
        original(self, logs, *args, **kwargs)
    finally:
        handler.callbacks = callbacks


def _is_logger(callback: Any) -> bool:
    reporting = type(callback).__module__.startswith("transformers.integrations")
    return reporting or isinstance(callback, PrinterCallback | ProgressCallback)


def _load(self: Trainer, original: Any, checkpoint: str | None) -> Any:
    """From a checkpoint only what there is no newer state of."""
    training = _training(self)
    if training is not None and training.recovery.step > 0:
        return None
    return original(self, checkpoint)
