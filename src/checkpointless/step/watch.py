"""Where a step of training is seen: hooks on registered optimizers, schedulers, the scaler and modules.

None of them may be traced by torch.compile, which would run it once, while it compiles, and never again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..errors import UnsupportedStateError
from ..state.optimizers import can_be_hooked, parts_of
from ..state.registry import Registry
from ..state.stateful import is_scaler
from .backward import BackwardWatch


class Observer(Protocol):
    """What is told of a step."""

    def opens(self) -> None:
        """An optimizer is about to change parameters."""

    def moved(self, name: str) -> None:
        """A part has moved."""

    def forward_begins(self) -> None:
        """A registered module is called."""

    def backward_begins(self) -> None:
        """Gradients of a registered module begin to flow."""

    def enter_section(self) -> None:
        """An optimizer that torch calls no hooks for is about to step."""

    def leave_section(self) -> None: ...


class Watch:
    """The hooks on one registry's objects, until `remove`."""

    def __init__(self, registry: Registry, observer: Observer) -> None:
        self._handles: list[Any] = []
        self._wrapped: list[tuple[Any, type]] = []
        self._observer = observer
        for name, optimizer in registry.torch_state.optimizers.items():
            if can_be_hooked(optimizer):
                self._hook(name, optimizer)
            else:
                self._wrap(optimizer, "step", self._stepping(name))
        for name, mover in registry.movers.items():
            self._wrap(mover, "update" if is_scaler(mover) else "step", self._moving(name))
        known = {id(o) for o in (*registry.optimizers.values(), *registry.torch_state.optimizers.values())}
        self._handles.append(register_optimizer_step_pre_hook(_Strangers(registry, known)))
        for module in registry.torch_state.modules.values():
            self._handles.append(BackwardWatch(module, observer.backward_begins, observer.forward_begins))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for target, original in self._wrapped:
            target.__class__ = original
        self._wrapped.clear()

    def _hook(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        opens = outside_graphs(self._observer.opens)
        moved = outside_graphs(functools.partial(self._observer.moved, name))
        self._handles.append(optimizer.register_step_pre_hook(lambda *_: opens()))
        self._handles.append(optimizer.register_step_post_hook(lambda *_: moved()))

    def _stepping(self, name: str) -> Callable[[Callable[[], Any]], Any]:
        def around(step: Callable[[], Any]) -> Any:
            self._observer.opens()
            self._observer.enter_section()
            try:
                value = step()
            finally:
                self._observer.leave_section()
            self._observer.moved(name)
            return value

        return around

    def _moving(self, name: str) -> Callable[[Callable[[], Any]], Any]:
        def around(move: Callable[[], Any]) -> Any:
            value = move()
            self._observer.moved(name)
            return value

        return around

    def _wrap(self, target: Any, method: str, around: Callable[[Callable[[], Any]], Any]) -> None:
        """By a class of its own for this object: an attribute of the object would get into its `state_dict`."""
        original = type(target)
        inner = getattr(original, method)

        @functools.wraps(inner)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            return around(lambda: inner(self, *args, **kwargs))

        names = {"__module__": original.__module__, "__qualname__": original.__qualname__, method: wrapped}
        target.__class__ = type(original.__name__, (original,), names)
        self._wrapped.append((target, original))


class _Strangers:
    """Refuses an optimizer that trains registered parameters and is not registered: a lost rank would get the weights
    and not its state. Asked before every step of every optimizer."""

    def __init__(self, registry: Registry, known: set[int]) -> None:
        self._registry = registry
        self._known = known

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if id(optimizer) not in self._known and not torch.compiler.is_compiling():
            self._meet(optimizer)

    def _meet(self, optimizer: torch.optim.Optimizer) -> None:
        names = {id(value): name for name, value in self._registry.torch_state.parameters().items()}
        trained = [names[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in names]
        if trained and self._only_contains(optimizer):
            return  # asked again before its next step
        self._known.add(id(optimizer))
        if trained and not _keeps_nothing(optimizer):
            raise UnsupportedStateError(
                f"{_with_article(type(optimizer).__name__)} trains '{trained[0]}', which is registered, and is not "
                "registered itself: register it, too (manager.register(..., optimizer=optimizer))"
            )

    def _only_contains(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether it steps others, which are all registered, and keeps nothing beside them."""
        inside = [part for part in parts_of("", optimizer).values() if part is not optimizer]
        return bool(inside) and not optimizer.state and all(id(part) in self._known for part in inside)


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIO' else 'a'} {name}"


def _keeps_nothing(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is plain gradient descent, whose next step needs nothing of the one before."""
    return type(optimizer) is torch.optim.SGD and not any(group["momentum"] for group in optimizer.param_groups)


def outside_graphs(function: Callable[[], None]) -> Callable[[], None]:
    """The same function, for hooks that torch.compile may come across: in a graph it is a break."""
    outside: Callable[[], None] = torch._disable_dynamo(lambda: function())

    def call() -> None:
        if torch.compiler.is_compiling():
            outside()
        else:
            function()

    return call
