"""DDP whose gradients are added in the same order after a restart as before it.

After its first backward pass DDP rearranges its gradient buckets once, in the order in which the gradients arrived,
and the place of an element in its bucket decides in which order a ring all-reduce adds it. A DDP made anew in the
middle of a run begins with the arrangement of the first step and rounds differently: measured, the weights of a
restarted run differ. Here the order of arrival is remembered, travels with the state, and a new DDP begins with it,
whoever makes it: the script, or the library it trains with.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .arrivals import ArrivalOrders, Known, key_of, trained
from .errors import RestoreError
from .state.registry import Registry

_log = logging.getLogger("hyperpodrun.checkpointless")

_UNKNOWN = -1


class Arranger:
    """Looks after every DDP of registered parameters that is made while it follows."""

    def __init__(self, orders: ArrivalOrders) -> None:
        self._orders = orders
        self._registry: Registry | None = None
        self._ready = self._resumed = self._said = False
        self._early: list[weakref.ref[DistributedDataParallel]] = []

    def registered(self, registry: Registry) -> None:
        """These objects are trained."""
        self._registry = registry

    def restored(self, *, resumed: bool) -> None:
        """The state is that of the step to go on with. `resumed`: and not the one with which a run begins."""
        self._ready, self._resumed = True, resumed
        if any(made() is not None for made in self._early) and not self._said:
            self._said = True
            _log.warning(
                "DistributedDataParallel was made before restore(): after a restart it adds gradients in another order "
                "than without the fault, and the last bits of the weights differ; make it after restore()"
            )

    def follow(self) -> None:
        """A function is entered: the DDPs that are made from now on are this one's."""
        global _following
        self._early.clear()
        self._ready = self._resumed = False
        _following = self
        _teach()

    def leave(self) -> None:
        """The function has returned."""
        global _following
        if _following is self:
            _following = None

    def synced(self, module: torch.nn.Module) -> bool:
        """Whether all ranks have the same already. (Who syncs none the less gives every rank the buffers of the
        first.)"""
        return self._resumed and self._names_of(module) is not None

    @contextlib.contextmanager
    def arranging(self, ddp: DistributedDataParallel) -> Iterator[None]:
        """Within, the buckets of `ddp` are made. All ranks take the first rank's word for the order, as DDP itself does
        when it rearranges."""
        names = self._names_of(ddp.module)
        if names is None or (ddp.find_unused_parameters and not ddp.static_graph):  # then DDP never rearranges
            yield
            return
        if not self._ready:
            self._early.append(weakref.ref(ddp))
            yield
            return
        parameters = trained(ddp.module)
        order = self._orders.of(key_of(parameters, names))
        known = _agree(order.known, len(parameters), ddp)
        if known is None:
            yield
            order.watch(parameters, lambda: bool(ddp.require_backward_grad_sync))
        else:
            order.learn(known)
            with _assigning(known.indices, _limits(ddp)):
                yield

    def _names_of(self, module: torch.nn.Module) -> dict[int, str] | None:
        """None where it trains something that is not registered."""
        if self._registry is None or self._registry.dropped:
            return None
        try:
            names = {id(value): name for name, value in self._registry.torch_state.parameters().items()}
        except RestoreError:  # it has changed, and is yet to be registered again
            return None
        return names if all(id(parameter) in names for parameter in trained(module)) else None


_following: Arranger | None = None


@functools.cache
def _teach() -> None:
    """From now on DDP's constructor asks who follows."""
    make, arrange = DistributedDataParallel.__init__, DistributedDataParallel._ddp_init_helper
    signature = inspect.signature(make)

    @functools.wraps(make)
    def made(self: DistributedDataParallel, *args: Any, **settings: Any) -> None:
        if _following is not None:
            given = signature.bind_partial(self, *args, **settings).arguments
            module = given.get("module")
            if "init_sync" not in given and isinstance(module, torch.nn.Module) and _following.synced(module):
                settings["init_sync"] = False
        make(self, *args, **settings)

    @functools.wraps(arrange)
    def arranged(self: DistributedDataParallel, *args: Any, **settings: Any) -> None:
        with _following.arranging(self) if _following is not None else contextlib.nullcontext():
            arrange(self, *args, **settings)  # type: ignore[no-untyped-call]

    DistributedDataParallel.__init__ = made  # type: ignore[method-assign]
    DistributedDataParallel._ddp_init_helper = arranged  # type: ignore[method-assign]


def _agree(mine: Known | None, count: int, ddp: DistributedDataParallel) -> Known | None:
    """The first rank's."""
    known = mine if mine is not None and len(mine.indices) == count else Known(_UNKNOWN, [_UNKNOWN] * count)
    row = torch.tensor([known.since, *known.indices], dtype=torch.int64, device=ddp.device)
    dist.broadcast(row, src=dist.get_global_rank(ddp.process_group, 0), group=ddp.process_group)
    since, *indices = row.tolist()
    return None if _UNKNOWN in indices else Known(since, indices)


def _limits(ddp: DistributedDataParallel) -> list[int]:
    """Bucket sizes in bytes with which the reducer rearranges."""
    config = getattr(ddp, "_bucket_config", None)
    if config is not None and config.per_bucket_bytes_caps:
        return list(config.per_bucket_bytes_caps)
    first = config.first_bucket_bytes_cap if config is not None else _first_limit(ddp)
    return [first, ddp.bucket_bytes_cap]


def _first_limit(ddp: DistributedDataParallel) -> int:
    """The first bucket's size in releases of torch that have no configuration object for it."""
    default: int = dist._DEFAULT_FIRST_BUCKET_BYTES
    return default if getattr(ddp, "bucket_bytes_cap_default", True) else ddp.bucket_bytes_cap


@contextlib.contextmanager
def _assigning(indices: list[int], limits: list[int]) -> Iterator[None]:
    """Within, the first assignment of parameters to buckets is that of the reducer when it rearranges."""
    original = dist._compute_bucket_assignment_by_size

    def assign(parameters: Any, first_limits: Any, sparse: Any = None) -> tuple[Any, Any]:
        ordered = [parameters[index] for index in indices]
        buckets, bounds = original(ordered, limits, sparse or [], indices)
        return list(reversed(buckets)), list(reversed(bounds))  # the caller reverses them once more

    dist._compute_bucket_assignment_by_size = assign  # type: ignore[assignment]
    try:
        yield
    finally:
        dist._compute_bucket_assignment_by_size = original
