"""The trainer's loop, followed: where it begins, where each step does, and what a fault in between leaves to be done.

`main` is entered again after a fault, and builds everything anew: process groups, meshes, model, optimizers, data. As
soon as the trainer has loaded its checkpoint, which in a restart it need not, all of it is registered and restored; the
loop then goes on with the step that was interrupted. Meanwhile three things of torchtitan are different: an update
comes last in its step, behind the collectives of the metrics; validation leaves the random numbers as they were; and
loggers live as long as the process.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar, overload

from ...checkpointless.manager import CheckpointManager
from ...inprocess.wrapper import HPWrapper
from .metrics import Metrics
from .state import state_of

P = ParamSpec("P")
R = TypeVar("R")


@overload
def recoverable(main: Callable[P, R], /, **settings: Any) -> Callable[P, R]: ...
@overload
def recoverable(**settings: Any) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def recoverable(main: Any = None, /, **settings: Any) -> Any:
    """Makes a function recoverable that builds a torchtitan Trainer and trains it, such as `torchtitan.train.main`.

    After a fault it is entered again, from its top, on every rank, and `train()` goes on with the interrupted step.
    `settings` are those of `CheckpointManager`, as in `@recoverable(snapshot_every=100)`.
    """
    if main is None:
        return functools.partial(recoverable, **settings)
    trainer_class = torchtitan("torchtitan.trainer").Trainer
    manager = CheckpointManager(**settings)
    loop = _Loop(manager, Metrics(torchtitan("torchtitan.components.metrics")))

    @functools.wraps(main)
    def entered(*args: Any, **kwargs: Any) -> Any:
        with _followed(trainer_class, loop), loop.metrics.kept():
            value = main(*args, **kwargs)
        loop.metrics.close()
        return value

    return HPWrapper(checkpoint_manager=manager)(entered)


def torchtitan(module: str) -> Any:
    """One of its modules. Raises ModuleNotFoundError, with one sentence, where it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"hyperpodrun.integrations.torchtitan needs torchtitan 0.3, and {error.name} is missing here: "
            "pip install 'hyperpodrun[titan]'",
            name=error.name,
        ) from None


@contextlib.contextmanager
def _followed(trainer_class: Any, loop: _Loop) -> Iterator[None]:
    """A trainer that is built meanwhile tells the loop when it trains, whatever it overrides."""
    init, train_step = trainer_class.__init__, trainer_class.train_step

    @functools.wraps(init)
    def built(trainer: Any, *args: Any, **kwargs: Any) -> None:
        init(trainer, *args, **kwargs)
        trainer.train = functools.partial(loop.train, trainer)

    @functools.wraps(train_step)
    def stepped(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        with _update_last(trainer):
            return train_step(trainer, *args, **kwargs)

    trainer_class.__init__, trainer_class.train_step = built, stepped
    try:
        yield
    finally:
        trainer_class.__init__, trainer_class.train_step = init, train_step


@contextlib.contextmanager
def _update_last(trainer: Any) -> Iterator[None]:
    """What moves in the update moves when the step is otherwise over. torchtitan gathers the losses of all ranks after
    the update; a fault in there would leave a step that counts, and whose losses nobody has."""
    due: list[Callable[[], Any]] = []
    with contextlib.ExitStack() as stack:
        for container in (trainer.optimizers, trainer.lr_schedulers):
            step = container.step
            stack.enter_context(_replaced(container, "step", functools.partial(due.append, step)))
        yield
    for step in due:
        step()


@contextlib.contextmanager
def _replaced(target: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of this object, for a while."""
    before = vars(target).get(name)
    setattr(target, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(target, name)
        else:
            setattr(target, name, before)


class _Loop:
    """The loops of this process's trainers, one after the other. A new trainer comes with every entry."""

    def __init__(self, manager: CheckpointManager, metrics: Metrics) -> None:
        self.metrics = metrics
        self._manager = manager
        self._base = 0
        """The trainer's step when the manager's was 0: that of the checkpoint it began with."""
        self._inside = False
        """A step is under way."""
        self._finished = -1
        """The last of the trainer's steps that this process has seen to its end, saving and validation included."""

    def train(self, trainer: Any) -> None:
        """`trainer.train()`, followed."""
        load, goes_on = trainer.checkpointer.load, trainer.should_continue_training
        self._inside = False

        def loaded(*args: Any, **kwargs: Any) -> bool:
            found = not self._manager.resuming and bool(load(*args, **kwargs))
            return self._begin(trainer) or found

        def continued() -> bool:
            self._step_ends(trainer)
            if not goes_on():
                return False
            self._manager.begin_step(trainer.step - self._base)
            self._inside = True
            return True

        trainer.checkpointer.load, trainer.should_continue_training = loaded, continued
        _keep_random_numbers(trainer)
        type(trainer).train(trainer)

    def _step_ends(self, trainer: Any) -> None:
        if self._inside:
            self._inside = False
            self._manager.end_step()
            self._finished = trainer.step

    def _begin(self, trainer: Any) -> bool:
        """The trainer is complete, and as it was before the step to go on with. Whether anything was restored."""
        finished = self._agree(trainer)
        _say_backward(trainer, self._manager)
        self._manager.register(**state_of(trainer))
        step = self._manager.restore()
        self._base = trainer.step - step
        if step and finished < trainer.step:
            self._catch_up(trainer)
        self.metrics.goes_on(trainer.step, resumed=step > 0)
        return step > 0

    def _agree(self, trainer: Any) -> int:
        """The last step that any rank has seen to its end. And the metrics of a new process belong to those that
        began first."""
        import torch

        known = torch.tensor([self._finished, -self.metrics.began], dtype=torch.int64, device=trainer.device)
        torch.distributed.all_reduce(known, op=torch.distributed.ReduceOp.MAX)
        finished, began = known.tolist()
        self.metrics.began = -began
        return int(finished)

    def _catch_up(self, trainer: Any) -> None:
        """The fault came when the step's update was complete, and the checkpoint or the validation that follows it was
        not: the step is not repeated, they are."""
        trainer.checkpointer.save(trainer.step, last_step=trainer.step == trainer.config.training.steps)
        validator = getattr(trainer, "validator", None)
        if trainer.config.validator.enable and validator is not None and validator.should_validate(trainer.step):
            validator.validate(trainer.model_parts, trainer.step)


def _say_backward(trainer: Any, manager: CheckpointManager) -> None:
    """The loss in chunks runs a part of the backward pass, and sends its gradients, before any gets to the output."""

    def called(module: Any, *_: Any) -> None:
        import torch

        if module.training and torch.is_grad_enabled():
            manager.begin_backward()

    for part in trainer.model_parts:
        part.register_forward_hook(called)


def _keep_random_numbers(trainer: Any) -> None:
    """Around validation: it draws a seed for its loader, after the update, and the step could not count before it."""
    validator = getattr(trainer, "validator", None)
    if validator is None:
        return
    import torch

    validate = validator.validate

    @functools.wraps(validate)
    def neutral(*args: Any, **kwargs: Any) -> Any:
        devices = [trainer.device] if trainer.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            return validate(*args, **kwargs)

    validator.validate = neutral
