"""DDP whose gradients are added in the same order after a restart as before it.

After its first backward pass DDP rearranges its gradient buckets once, in the order in which the gradients arrived,
and the place of an element in its bucket decides in which order a ring all-reduce adds it. A DDP made anew in the
middle of a run begins with the arrangement of the first step and rounds differently: measured, the weights of a
restarted run differ. Here the order of arrival is remembered, travels with the state, and a new DDP begins with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

_UNKNOWN = -1


class ArrivalOrder:
    """The order in which gradients arrived in the first backward pass: indices of the trained parameters."""

    def __init__(self) -> None:
        self.indices: list[int] | None = None
        self._arriving: list[int] = []
        self._handles: list[Any] = []
        self._watched: list[torch.nn.Parameter] = []

    def watch(self, ddp: DistributedDataParallel) -> None:
        """Notes the arrivals until `first_step_done`."""
        self._forget()
        self._watched = _trained(ddp.module)
        for index, parameter in enumerate(self._watched):

            def arrived(_: torch.Tensor, index: int = index) -> None:
                if ddp.require_backward_grad_sync and index not in self._arriving:
                    self._arriving.append(index)

            self._handles.append(parameter.register_post_accumulate_grad_hook(arrived))

    def first_step_done(self) -> None:
        if self.indices is None and self._arriving:
            self.indices = list(self._arriving)
        if self._handles:
            self._forget()

    def forget(self) -> None:
        """What arrives next is of another model."""
        self.indices = None
        self._forget()

    def _forget(self) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter in self._watched:
            if not parameter._post_accumulate_grad_hooks:
                # autograd would look for hooks there in every step, 6 us for each parameter
                parameter._post_accumulate_grad_hooks = None  # type: ignore[assignment]
        self._handles.clear()
        self._watched.clear()
        self._arriving.clear()


def data_parallel(module: torch.nn.Module, order: ArrivalOrder, settings: dict[str, Any]) -> DistributedDataParallel:
    """`DistributedDataParallel(module, **settings)` whose buckets are those that the run has by now.

    All ranks take rank 0's word for the order, as DDP itself does when it rearranges.
    """
    group = settings.get("process_group")
    rearranges = not settings.get("find_unused_parameters", False)
    indices = _agree(order, len(_trained(module)), module, group) if rearranges else None
    settings.setdefault("init_sync", indices is None)
    ddp = DistributedDataParallel(module, **settings) if indices is None else _Arranged(module, indices, settings)
    if rearranges and indices is None:
        order.watch(ddp)
    order.indices = indices
    return ddp


def _trained(module: torch.nn.Module) -> list[torch.nn.Parameter]:
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


def _agree(order: ArrivalOrder, count: int, module: torch.nn.Module, group: Any) -> list[int] | None:
    device = next(module.parameters()).device
    known = order.indices if order.indices is not None and len(order.indices) == count else [_UNKNOWN] * count
    row = torch.tensor(known, dtype=torch.int64, device=device)
    dist.broadcast(row, src=dist.get_global_rank(group, 0) if group is not None else 0, group=group)
    indices: list[int] = row.tolist()
    return None if _UNKNOWN in indices else indices


class _Arranged(DistributedDataParallel):
    """DDP that begins with the buckets it would have after rearranging, instead of those of a first step."""

    def __init__(self, module: torch.nn.Module, indices: list[int], settings: dict[str, Any]) -> None:
        object.__setattr__(self, "_arrival_order", indices)  # before torch's constructor, which arranges
        super().__init__(module, **settings)

    def _ddp_init_helper(self, *args: Any, **kwargs: Any) -> None:
        indices: list[int] = self.__dict__["_arrival_order"]
        with _assigning(indices, self._limits()):
            super()._ddp_init_helper(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _limits(self) -> list[int]:
        """Bucket sizes in bytes with which the reducer rearranges."""
        config = getattr(self, "_bucket_config", None)
        if config is not None and config.per_bucket_bytes_caps:
            return list(config.per_bucket_bytes_caps)
        first = config.first_bucket_bytes_cap if config is not None else _first_limit(self)
        return [first, self.bucket_bytes_cap]


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
