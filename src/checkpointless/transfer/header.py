"""A state, ready to be given away: its header and its memory. The same for a live one, a snapshot, a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from ..errors import RestoreError
from ..state.registry import Registry
from ..state.small import SmallState, SmallStateTaker
from .buckets import Memory
from .exchange import check_skeleton


@dataclass
class Header:
    """What describes a state: its step, its tensors, its note, and what was learned of the training loop."""

    step: int
    skeleton: list[Any]
    host_state: dict[str, Any]
    note: bytes
    learned: tuple[list[str], bool, bool]
    order: list[int] | None

    def as_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "skeleton": self.skeleton,
            "host_state": self.host_state,
            "note": self.note,
            "learned": self.learned,
            "order": self.order,
        }

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> Header:
        """Checks what came from elsewhere. Raises RestoreError."""
        try:
            header = Header(
                fields["step"],
                list(check_skeleton(fields["skeleton"])),
                fields["host_state"],
                fields["note"],
                msgspec.convert(fields["learned"], tuple[list[str], bool, bool]),
                msgspec.convert(fields["order"], list[int] | None),
            )
        except KeyError as error:
            raise RestoreError(f"the description of the state lacks {error}") from None
        except msgspec.ValidationError as error:
            raise RestoreError(f"the description of the state makes no sense: {error}") from None
        types = (int, dict, bytes)
        if not all(map(isinstance, (header.step, header.host_state, header.note), types)):
            raise RestoreError("the description of the state has fields of wrong types")
        return header


def describe(
    registry: Registry, note: SmallState, learned: tuple[list[str], bool, bool], order: list[int] | None
) -> Header:
    """The header of the registered state, which is that before `note.step`."""
    state = registry.state
    return Header(note.step, state.skeleton(), state.host_state(), registry.notes.whole_bytes(note), learned, order)


def build(registry: Registry, header: Header, step: int) -> Memory:
    """Makes the tensors that the header describes; they are then to be filled. Raises RestoreError."""
    if header.step != step:
        raise RestoreError(f"the source stands at step {header.step}, the plan says {step}")
    registry.state.materialise(header.skeleton)
    registry.state.load_host_state(header.host_state)
    memory = Memory(registry.state.named_tensors())
    described = [item[0] for item in header.skeleton]
    if list(memory.rows) != described:
        odd = sorted(set(memory.rows) ^ set(described))
        raise RestoreError(f"the source's state and this rank's differ in {', '.join(odd[:3]) or 'their order'}")
    return memory


def read_small_state(header: Header) -> SmallState:
    return SmallStateTaker.from_bytes(header.step, header.note)
