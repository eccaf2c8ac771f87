"""`@recoverable`: a function that trains with accelerate, entered again after a fault as if it had never run."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, overload

from ...checkpointless.errors import UnsupportedStateError
from .config import apply_config
from .missing import require
from .recovery import Recovery, make_current

P = ParamSpec("P")
R = TypeVar("R")


@overload
def recoverable(function: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def recoverable(**settings: Any) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def recoverable(function: Any = None, /, **settings: Any) -> Any:
    """Makes a function recoverable that builds an `Accelerator`, prepares its objects and trains them.

    After a fault it is entered again, from its top, on every rank; `Accelerator.prepare` brings the state to where the
    interrupted step began, and `epochs` goes on with it. `settings` are those of `CheckpointManager`, as in
    `@recoverable(snapshot_every=100)`.
    """
    require("accelerate", user="hyperpodrun.integrations.accelerate.recoverable", extra="hf")
    from .teaching import teach

    return decorate(function, settings, teach)


def decorate(function: Any, settings: dict[str, Any], teach: Callable[[], None]) -> Any:
    """`teach`: has the framework's classes ask for the current recovery."""
    if function is None:
        return lambda given: decorate(given, settings, teach)
    if not callable(function):
        raise TypeError(
            f"recoverable() takes the function that makes and runs the training, not a {type(function).__name__}: "
            "what is made outside of it holds on to a process group that a fault takes away"
        )
    from ...checkpointless.manager import CheckpointManager
    from ...inprocess.wrapper import HPWrapper

    manager = CheckpointManager(**settings)
    recovery = Recovery(manager)

    @functools.wraps(function)
    def entered(*args: Any, **kwargs: Any) -> Any:
        teach()
        _forget_states()
        apply_config(os.environ)
        recovery.entered()
        make_current(recovery)
        try:
            return function(*args, **kwargs)
        finally:
            make_current(None)

    return HPWrapper(checkpoint_manager=manager)(entered)


def _forget_states() -> None:
    """accelerate keeps device, ranks and gradient accumulation in singletons of the process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from torch import distributed as dist

    if dist.is_initialized():
        raise UnsupportedStateError(
            "there is a process group before the recoverable function has begun, and a fault takes it away: make the "
            "Accelerator, or the TrainingArguments, inside the function"
        )
    AcceleratorState._reset_state()
    PartialState._reset_state()
    GradientState._reset_state()
