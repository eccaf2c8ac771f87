"""What is registered, sorted by how it is carried: large tensors, noted objects, parts that move in an update."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..step.backward import BackwardWatch
from .encoding import EncodingError, encode
from .provider import CombinedState, StateProvider
from .small import SmallStateTaker
from .stateful import read_object
from .tensors import TorchState

_SCHEDULERS = (torch.optim.lr_scheduler.LRScheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)


class Registry:
    """The objects of one registration. `on_move` is called with a part's name when it has moved.

    Modules and optimizers make a `TorchState`, beside which there may be other providers of state; optimizers,
    schedulers and the gradient scaler move in an update and are noted in the shared part; generators and anything else
    with `state_dict` are noted in the local part.
    """

    def __init__(self, objects: dict[str, Any]) -> None:
        self.objects = dict(objects)
        self.modules = {name: o for name, o in objects.items() if isinstance(o, torch.nn.Module)}
        self.optimizers = {name: o for name, o in objects.items() if isinstance(o, torch.optim.Optimizer)}
        self.movers = {name: o for name, o in objects.items() if isinstance(o, _SCHEDULERS) or _is_scaler(o)}
        providers = {name: o for name, o in objects.items() if isinstance(o, StateProvider)}
        carried = {*self.modules, *self.optimizers, *self.movers, *providers}
        rest = {name: o for name, o in objects.items() if name not in carried}
        for name, target in rest.items():
            _check(name, target)
        torch_state = TorchState(self.modules, self.optimizers)
        self.state = CombinedState(torch_state, providers)
        self.notes = SmallStateTaker()
        self.notes.set_buffers(torch_state.buffers)
        self.notes.local = rest
        self.notes.shared = {**self.optimizers, **self.movers}
        self.dropped = False
        """The tensors have been let go (`drop_tensors`)."""
        self._handles: list[Any] = []
        self._wrapped: list[tuple[Any, type]] = []

    def watch(
        self,
        on_open: Callable[[], None],
        on_move: Callable[[str], None],
        on_backward: Callable[[], None],
    ) -> None:
        """Has `on_open` called before an optimizer steps, `on_move` after a part has moved, `on_backward` when the
        gradients of a forward pass begin to flow."""
        for name, optimizer in self.optimizers.items():
            self._handles.append(optimizer.register_step_pre_hook(lambda *_: on_open()))
            self._handles.append(optimizer.register_step_post_hook(lambda *_, name=name: on_move(name)))
        for name, mover in self.movers.items():
            self._wrap(mover, "update" if _is_scaler(mover) else "step", functools.partial(on_move, name))
        for module in self.modules.values():
            self._handles.append(BackwardWatch(module, on_backward))

    def release(self) -> None:
        """Takes the hooks away again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for target, original in self._wrapped:
            target.__class__ = original
        self._wrapped.clear()

    def drop_tensors(self) -> None:
        """Lets go of everything large: the state has been copied elsewhere and other objects will take over."""
        self.release()
        self.dropped = True
        self.state.drop()

    def _wrap(self, target: Any, method: str, moved: Callable[[], None]) -> None:
        """By a class of its own for this object: an attribute of the object would get into its `state_dict`."""
        original = type(target)
        inner = getattr(original, method)

        @functools.wraps(inner)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            value = inner(self, *args, **kwargs)
            moved()
            return value

        names = {"__module__": original.__module__, "__qualname__": original.__qualname__, method: wrapped}
        target.__class__ = type(original.__name__, (original,), names)
        self._wrapped.append((target, original))


def _is_scaler(target: Any) -> bool:
    return isinstance(target, torch.amp.GradScaler) or type(target).__name__ == "ShardedGradScaler"


def _check(name: str, target: Any) -> None:
    """Early, and with the object's name, instead of in the middle of a recovery."""
    if not _is_generator(target) and not (hasattr(target, "state_dict") and hasattr(target, "load_state_dict")):
        raise TypeError(
            f"register({name}=...): a {type(target).__name__} has no state_dict and load_state_dict; "
            "wrap it in an object that has"
        )
    try:
        encode(read_object(target))
    except EncodingError as error:
        raise TypeError(f"register({name}=...): {error}; let its state_dict give plain values and tensors") from None


def _is_generator(target: Any) -> bool:
    import random

    return isinstance(target, torch.Generator | random.Random) or hasattr(target, "bit_generator")
