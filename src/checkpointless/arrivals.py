"""In which order the gradients of each DDP arrived, by the step from which on that decides how they are added.

A script may have several (`data_parallel` for a generator and a critic), and may make one anew with other parameters.
Each is known by the names of the parameters it trains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch
import xxhash


class Known(msgspec.Struct, frozen=True):
    """An order that holds for every step from `since` on, until a later one does."""

    since: int
    indices: list[int]
    """Of the trained parameters."""


class ArrivalOrder:
    """Of one DDP."""

    def __init__(self) -> None:
        self._known: list[Known] = []
        self._arriving: list[int] = []
        self._handles: list[Any] = []
        self._watched: Sequence[torch.nn.Parameter] = ()

    @property
    def known(self) -> Known | None:
        """The one that holds now."""
        return self._known[-1] if self._known else None

    def learn(self, known: Known) -> None:
        """It is known from elsewhere."""
        self._forget()
        self._known = [known]

    def watch(self, parameters: Sequence[torch.nn.Parameter], counts: Callable[[], bool]) -> None:
        """Notes the arrivals of a new DDP until the step ends. `counts`: whether a gradient arrives to be exchanged."""
        self._forget()
        self._watched = parameters
        for index, parameter in enumerate(parameters):

            def arrived(_: torch.Tensor, index: int = index) -> None:
                if index not in self._arriving and counts():
                    self._arriving.append(index)

            self._handles.append(parameter.register_post_accumulate_grad_hook(arrived))

    def step_ends(self, step: int) -> None:
        """What has arrived is the order that the steps from `step` on are added in."""
        if self._arriving:
            self._known.append(Known(step, list(self._arriving)))
            self._forget()

    def at(self, step: int) -> Known | None:
        """What held when `step` began."""
        return next((known for known in reversed(self._known) if known.since <= step), None)

    def go_to(self, step: int) -> None:
        """The state is that before `step`: what has arrived later is of steps that have never been."""
        self._forget()
        self._known = [known for known in self._known if known.since <= step]

    def _forget(self) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter in self._watched:
            if not parameter._post_accumulate_grad_hooks:
                # autograd would look for hooks there in every step, 6 us for each parameter
                parameter._post_accumulate_grad_hooks = None  # type: ignore[assignment]
        self._handles.clear()
        self._watched = ()
        self._arriving.clear()


class ArrivalOrders:
    """Of every DDP of this process."""

    def __init__(self) -> None:
        self._orders: dict[str, ArrivalOrder] = {}

    def of(self, key: str) -> ArrivalOrder:
        return self._orders.setdefault(key, ArrivalOrder())

    def step_ends(self, step: int) -> None:
        """A pass of the loop is about to be the one before `step`. To be said before anything counts as the state of
        that step, so that no state is without its order."""
        for order in self._orders.values():
            order.step_ends(step)

    def go_to(self, step: int) -> None:
        """The state is that before `step`."""
        for order in self._orders.values():
            order.go_to(step)

    def forget(self) -> None:
        """What arrives next is of other models."""
        self.go_to(-1)
        self._orders.clear()

    def told(self, step: int) -> dict[str, Known]:
        """What belongs to the state before `step`, to go with it."""
        at = {key: order.at(step) for key, order in self._orders.items()}
        return {key: known for key, known in at.items() if known is not None}

    def adopt(self, told: dict[str, Known]) -> None:
        """Another rank's state is this rank's now."""
        self.forget()
        for key, known in told.items():
            self.of(key).learn(known)


def key_of(parameters: Sequence[torch.nn.Parameter], names: dict[int, str]) -> str:
    """Which DDP it is, 16 hexadecimal digits. `names`: by the `id` of a parameter, of those that are registered."""
    total = xxhash.xxh3_64()
    for parameter in parameters:
        total.update(f"{names.get(id(parameter), '')} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
    return total.hexdigest()


def trained(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters in the order in which DDP counts them."""
    seen: set[int] = set()
    found: list[torch.nn.Parameter] = []
    ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", ())
    for prefix, submodule in module.named_modules():
        for name, parameter in submodule.named_parameters(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            if parameter.requires_grad and full not in ignored and id(parameter) not in seen:
                seen.add(id(parameter))
                found.append(parameter)
    return found
