"""accelerate's classes ask, from the first recoverable function on, whether there is a recovery; else they do as ever.

Owned: what is replaced in them, once per process. Nothing of it changes a number.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from accelerate.scheduler import AcceleratedScheduler

from ...checkpointless.errors import UnsupportedStateError
from ...checkpointless.state.registry import SCHEDULERS
from .loop import looping
from .recovery import Recovery, current


@functools.cache
def teach() -> None:
    """Once."""
    prepare, step = Accelerator.prepare, AcceleratedScheduler.step

    @functools.wraps(prepare)
    def prepared(self: Accelerator, *args: Any, **settings: Any) -> Any:
        recovery = current()
        if recovery is not None and not recovery.started:
            _start(recovery, self, args)
        return prepare(self, *args, **settings)

    @functools.wraps(step)
    def stepped(self: AcceleratedScheduler, *args: Any, **kwargs: Any) -> None:
        recovery = current()
        loop = looping()
        if recovery is None or loop is None or not loop.inside or not self.gradient_state.sync_gradients:
            step(self, *args, **kwargs)
            return
        with recovery.manager.update():  # it moves once per rank, and the update ends with the last of these
            step(self, *args, **kwargs)

    Accelerator.prepare = prepared
    AcceleratedScheduler.step = stepped
    for kind in (DataLoaderShard, DataLoaderDispatcher):
        _teach_loader(kind)


def _teach_loader(kind: type) -> None:
    iterate = kind.__iter__  # type: ignore[attr-defined]

    @functools.wraps(iterate)
    def iterated(self: Any) -> Iterator[Any]:
        loop = looping()
        if loop is None or loop.loader is not self:
            return iterate(self)  # type: ignore[no-any-return]
        return loop.batches(lambda: iterate(self))

    kind.__iter__ = iterated  # type: ignore[attr-defined]


def refuse(accelerator: Accelerator) -> None:
    """What is not recovered yet."""
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UnsupportedStateError(
            f"a recoverable function cannot train with accelerate's {kind.value}, only with DDP: write the loop with "
            "CheckpointManager and torch.distributed.fsdp.fully_shard (docs/checkpointless.md)"
        )


def _start(recovery: Recovery, accelerator: Accelerator, args: tuple[Any, ...]) -> None:
    """The call that prepares the optimizer is where the state arrives: the model is not in DDP yet."""
    modules = [o for o in args if isinstance(o, torch.nn.Module)]
    optimizers = [o for o in args if isinstance(o, torch.optim.Optimizer)]
    if not optimizers:
        if any(parameter.requires_grad for module in modules for parameter in module.parameters()):
            raise UnsupportedStateError(
                "Accelerator.prepare() was given a model without its optimizer: in a recoverable function prepare "
                "models, optimizers and schedulers together, in one call"
            )
        return
    refuse(accelerator)
    schedulers = [o for o in args if isinstance(o, SCHEDULERS)]
    if accelerator.device_placement:
        for module in modules:
            module.to(accelerator.device)
    objects = _named("model", modules) | _named("optimizer", optimizers) | _named("scheduler", schedulers)
    objects |= _named("object", accelerator._custom_objects)
    if accelerator.scaler is not None:
        objects["scaler"] = accelerator.scaler
    recovery.start("Accelerator.prepare()", accelerator.device, **objects)


def _named(name: str, objects: list[Any]) -> dict[str, Any]:
    return {name if number == 0 else f"{name}_{number + 1}": target for number, target in enumerate(objects)}
