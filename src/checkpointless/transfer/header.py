"""A state, ready to be given away: its header and its memory. The same for a live one, a snapshot, a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import msgspec

from ..arrivals import Known
from ..errors import RestoreError
from ..state.provider import Layouts, check_layouts, check_skeleton, layouts_of
from ..state.registry import Registry
from ..state.small import SmallState, SmallStateTaker
from ..step.tracker import Learned
from .buckets import Memory


@dataclass
class Header:
    """What describes a state: its step, its tensors, its small state, and what was learned of the training loop."""

    step: int
    skeleton: list[Any]
    layouts: Layouts
    host_state: dict[str, Any]
    small: bytes
    """The small state of `step`, encoded."""
    before: tuple[int, bytes]
    """The step before it and its small state, encoded, for who must find out whether a part of it was equal to its own;
    (0, b""): not known any more."""
    learned: Learned
    orders: dict[str, Known]
    """In which gradients arrived: see `arrivals.py`."""

    def as_dict(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "learned": msgspec.to_builtins(self.learned), "orders": msgspec.to_builtins(self.orders)}

    @staticmethod
    def from_dict(told: dict[str, Any]) -> Header:
        """Checks what came from elsewhere. Raises RestoreError."""
        try:
            skeleton = list(check_skeleton(told["skeleton"]))
            header = Header(
                msgspec.convert(told["step"], int),
                skeleton,
                check_layouts(told["layouts"], skeleton),
                told["host_state"],
                msgspec.convert(told["small"], bytes),
                msgspec.convert(told["before"], tuple[int, bytes]),
                msgspec.convert(told["learned"], Learned),
                msgspec.convert(told["orders"], dict[str, Known]),
            )
        except KeyError as error:
            raise RestoreError(f"the description of the state lacks {error}") from None
        except msgspec.ValidationError as error:
            raise RestoreError(f"the description of the state makes no sense: {error}") from None
        if not isinstance(header.host_state, dict):
            raise RestoreError("the description of the state has no host state")
        return header


def describe(
    registry: Registry,
    small: SmallState,
    learned: Learned,
    orders: dict[str, Known],
    before: SmallState | None = None,
) -> Header:
    """The header of the registered state, which is that before `small.step`. `before`: of the step before it."""
    state, taker = registry.state, registry.taker
    tensors = state.named_tensors()
    earlier = (0, b"") if before is None else (before.step, taker.whole_bytes(before))
    return Header(
        small.step,
        state.skeleton(),
        layouts_of(tensors),
        state.host_state(),
        taker.whole_bytes(small),
        earlier,
        learned,
        orders,
    )


def build(registry: Registry, header: Header, step: int) -> Memory:
    """Makes the tensors that the header describes; they are then to be filled. Raises RestoreError."""
    if header.step != step:
        raise RestoreError(f"the source stands at step {header.step}, the plan says {step}")
    registry.state.materialise(header.skeleton)
    registry.state.load_host_state(header.host_state)
    memory = Memory(registry.state.named_tensors(), header.layouts)
    described = [item[0] for item in header.skeleton]
    if list(memory.rows) != described:
        odd = sorted(set(memory.rows) ^ set(described))
        raise RestoreError(f"the source's state and this rank's differ in {', '.join(odd[:3]) or 'their order'}")
    return memory


def read_small_state(header: Header) -> SmallState:
    return SmallStateTaker.from_bytes(header.step, header.small)


def read_before(header: Header) -> SmallState | None:
    """The small state of the step before, if the source knew it."""
    step, data = header.before
    return SmallStateTaker.from_bytes(step, data) if data else None
