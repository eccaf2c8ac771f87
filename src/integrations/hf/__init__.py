"""transformers.Trainer, recovered bit for bit.

    from hyperpodrun.integrations.hf import recoverable    # 1

    @recoverable                                           # 2
    def main():
        trainer = Trainer(model=..., args=TrainingArguments(...), train_dataset=...)
        trainer.train()

- `recoverable`: makes a function one that is entered again after a fault.
- `teaching`: the methods of Trainer that ask for a recovery, if there is one.
- `training.Training`: one call of `train()`, from the step that is due to its end.
- `state`: what a Trainer keeps beside model, optimizer and scheduler, as plain values.

Importing this imports no transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, overload

from ..accelerate.entry import decorate
from ..accelerate.missing import require

__all__ = ["recoverable"]

P = ParamSpec("P")
R = TypeVar("R")


@overload
def recoverable(function: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def recoverable(**settings: Any) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def recoverable(function: Any = None, /, **settings: Any) -> Any:
    """Makes a function recoverable that builds `TrainingArguments` and a `Trainer`, and trains.

    After a fault it is entered again, from its top, on every rank, and `train()` goes on with the interrupted step.
    `settings` are those of `CheckpointManager`, as in `@recoverable(snapshot_every=100)`.
    """
    require("transformers", "accelerate", user="hyperpodrun.integrations.hf.recoverable", extra="hf")
    from .teaching import teach

    return decorate(function, settings, teach)
