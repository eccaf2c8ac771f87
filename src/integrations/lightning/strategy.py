"""`CheckpointlessStrategy`: makes a strategy of Lightning's recover without checkpoints; mixed into DDP and FSDP2.

The process group, the trainer and all that hangs on it are made anew in every entry of the wrapped function. Between
the optimizers and DDP, the first moment at which all that is trained is there, the state is restored; DDP made after
that rounds as it did.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from ...checkpointless.errors import UnsupportedStateError
from ...checkpointless.manager import CheckpointManager
from .entry import Known, agree
from .files import Files
from .loggers import forget_aside
from .position import Position, is_model_checkpoint
from .recover import running_manager
from .steps import Steps

_KEEPS_WEIGHTS = ("StochasticWeightAveraging", "WeightAveraging", "EMAWeightAveraging")
_known: weakref.WeakKeyDictionary[CheckpointManager, Known] = weakref.WeakKeyDictionary()


class CheckpointlessStrategy:
    """Mixin before a strategy class of Lightning's: `class Mine(CheckpointlessStrategy, DDPStrategy)`.

    `manager`: the CheckpointManager of the HPWrapper around the function; None: that of `recoverable`.
    """

    def __init__(self, *args: Any, manager: CheckpointManager | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        found = manager or running_manager()
        if found is None:
            raise UnsupportedStateError(
                f"{type(self).__name__} is made outside of a recoverable function: put @recoverable before the "
                "function that makes the trainer, or pass manager= with the one that HPWrapper has"
            )
        self._manager = found
        self._steps: Steps | None = None
        self._files = Files()
        self._ready = self._failed = False

    # ---- Lightning's hooks -----------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        super().setup_environment()  # type: ignore[misc]
        strategy: Any = self
        trainer = strategy.lightning_module.trainer
        if _is_fit(trainer):
            known = _known[self._manager] = agree(trainer, _known.get(self._manager), self._manager)
            self._files.began = known.began

    def setup(self, trainer: Any) -> None:
        self._ready = self._failed = False
        super().setup(trainer)  # type: ignore[misc]

    def configure_ddp(self) -> None:
        """The optimizers come before DDP, and the state between them."""
        strategy: Any = self
        self.setup_optimizers(strategy.lightning_module.trainer)
        super().configure_ddp()  # type: ignore[misc]

    def setup_optimizers(self, trainer: Any) -> None:
        if self._ready:
            return
        super().setup_optimizers(trainer)  # type: ignore[misc]
        if _is_fit(trainer):
            self._ready = True
            self._restore(trainer)

    def _restore(self, trainer: Any) -> None:
        strategy: Any = self
        _refuse(trainer, strategy)
        position = Position(trainer, self._files)
        position.begins()
        named = {"model": strategy.lightning_module, "lightning": position}
        named |= _numbered("optimizer", strategy.optimizers)
        named |= _numbered("scheduler", [config.scheduler for config in strategy.lr_scheduler_configs])
        if getattr(strategy.precision_plugin, "scaler", None) is not None:
            named["scaler"] = strategy.precision_plugin.scaler
        self._manager.register(**named)
        self._position = position
        first = self._manager.restore()
        self._steps = Steps(trainer, self._manager, position)
        for callback in trainer.callbacks:
            if is_model_checkpoint(callback):
                self._files.watch(callback, trainer)
        if position.given is not None:
            self._steps.resume()
        elif trainer.is_global_zero:
            forget_aside(trainer)
        if first and position.given is None:
            raise UnsupportedStateError(
                f"step {first} is due, and the position of Lightning's trainer there is not known"
            )

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self._steps is not None:
            self._position.note_output(output)
        return output

    def pre_backward(self, closure_loss: torch.Tensor) -> None:
        super().pre_backward(closure_loss)  # type: ignore[misc]
        if self._steps is not None:
            self._manager.begin_backward()

    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        """Lightning gives `step` a closure that computes the gradients. Within, a fault in a collective would find
        every rank in the middle of its update; so that is done first."""
        strategy: Any = self
        plugin = strategy.precision_plugin
        if self._steps is None or getattr(plugin, "scaler", None) is not None:  # a scaler is given the gradients, too
            return super().optimizer_step(optimizer, closure, model, **kwargs)  # type: ignore[misc]
        value = plugin._wrap_closure(model or strategy.lightning_module, optimizer, closure)
        self._steps.update_begins()
        return optimizer.step(closure=lambda: value, **kwargs)

    def save_checkpoint(self, checkpoint: Any, filepath: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, filepath, storage_options)  # type: ignore[misc]
        self._files.saved(filepath)

    def remove_checkpoint(self, filepath: Any) -> None:
        super().remove_checkpoint(filepath)  # type: ignore[misc]
        self._files.removed(filepath)

    def on_exception(self, exception: BaseException) -> None:
        self._failed = True
        if self._steps is not None:
            self._steps.leave(exception)
        super().on_exception(exception)  # type: ignore[misc]

    def teardown(self) -> None:
        """After a fault everything stays where it is: it is what the next entry, or a peer, takes its state from."""
        if not self._failed:
            super().teardown()  # type: ignore[misc]


def _is_fit(trainer: Any) -> bool:
    return str(getattr(trainer.state.fn, "value", trainer.state.fn)) == "fit"


def _numbered(name: str, targets: list[Any]) -> dict[str, Any]:
    return {name if not number else f"{name}_{number}": target for number, target in enumerate(targets)}


def _refuse(trainer: Any, strategy: Any) -> None:
    """What would not come out right."""
    for callback in trainer.callbacks:
        if any(kind.__name__ in _KEEPS_WEIGHTS for kind in type(callback).__mro__):
            raise UnsupportedStateError(
                f"callback {type(callback).__name__} keeps weights of its own, which are not carried: average in the "
                "module (torch.optim.swa_utils.AveragedModel as an attribute), or do without"
            )
    for optimizer in strategy.optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise UnsupportedStateError("LBFGS computes gradients within its step, which cannot be repeated exactly")
    if getattr(strategy, "_model_averaging_period", None) is not None:
        raise UnsupportedStateError("averaging weights between ranks every few steps (post-local SGD) is not carried")
