"""Notes: what a step touches besides parameters and optimizer state, kept as of the step's beginning.

Random generators, buffers that the forward pass changes, the data position, schedulers, the gradient scaler and the
optimizers' hyperparameters. An interrupted step is repeated from its note and thus repeated exactly.
A note has two parts. The *local* one is known to this rank only and goes into its record (`record.py`) too; the
*shared* one is equal on all replicas and comes from the peer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .encoding import EncodingError, decode, encode
from .generators import States, read_generators, write_generators
from .stateful import is_object_in, read_object, same, write_object

_LARGEST_RECORDED_BUFFERS = 8 << 20
"""So many bytes of buffers, together, are written into the record at most, at every step: the small ones first."""
_LARGEST_ALWAYS_COPIED = 256 << 10
"""Buffers up to this size are copied and compared themselves: batch norm changes its statistics without counting that
as a version. Larger ones (masks, tables of rotary embeddings) are believed when their version says they are the same.
"""


@dataclass(slots=True)
class SmallState:
    """The state before pass `step` of the loop, less parameters and optimizer state."""

    step: int
    generators: States
    buffers: dict[str, tuple[int, torch.Tensor]] = field(default_factory=dict)
    """By name: the version counter of the buffer and a copy of its contents."""
    local: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    taken_by: SmallStateTaker | None = None
    """Whose buffers the version counters belong to; None for a note that came from elsewhere."""


class SmallStateTaker:
    """Takes notes of registered objects, and puts them back."""

    def __init__(self) -> None:
        self._encoded: dict[str, tuple[object, bytes]] = {}
        """By generator: a state and its encoding; most states stay what they were."""
        self.buffers: dict[str, torch.Tensor] = {}
        self.local: dict[str, Any] = {}
        self.shared: dict[str, Any] = {}
        self.on_device: dict[str, torch.Tensor] = {}
        """The buffers of a GPU that are to be recorded by the device itself."""
        self._recorded: frozenset[str] = frozenset()
        self._last_bytes: tuple[States, bytes] | None = None
        """Of the last note that held nothing else: the states of the generators, and these encoded."""

    def set_buffers(self, buffers: Mapping[str, torch.Tensor]) -> None:
        """The buffers to note. Large ones (masks, tables) are left out of the record, and so are those of all GPUs but
        one: a successor has them from a replica."""
        self.buffers = dict(buffers)
        recorded: set[str] = set()
        on_device: dict[str, torch.Tensor] = {}
        room = _LARGEST_RECORDED_BUFFERS
        for name, buffer in sorted(self.buffers.items(), key=lambda item: item[1].nbytes):
            if buffer.nbytes > room:
                break
            room -= buffer.nbytes
            if _is_on_device(buffer):
                first = next(iter(on_device.values()), buffer)
                if buffer.device == first.device and _small(buffer):  # it is copied at every step, changed or not
                    on_device[name] = buffer
            elif buffer.device.type == "cpu":
                recorded.add(name)
        self._recorded, self.on_device = frozenset(recorded), on_device

    def take(self, step: int, last: SmallState | None = None, *, local_only: bool = False) -> SmallState:
        """The state now. What has not changed since `last` is not copied again."""
        note = SmallState(step, read_generators(), taken_by=self)
        if self.buffers:
            note.buffers = {name: self._copy(name, buffer, last) for name, buffer in self.buffers.items()}
        if self.local:
            note.local = {name: read_object(target) for name, target in self.local.items()}
        if not local_only:
            note.shared = {name: read_object(target) for name, target in self.shared.items()}
        return note

    def changed(self, note: SmallState) -> bool:
        """Whether anything differs from the note."""
        if note.taken_by is not self or not same(note.generators, read_generators()):
            return True
        for name, buffer in self.buffers.items():
            if _differs(note.buffers[name], buffer):
                return True
        for noted, targets in ((note.local, self.local), (note.shared, self.shared)):
            for name, target in targets.items():
                if not is_object_in(target, noted[name]):
                    return True
        return False

    def put_back(self, note: SmallState) -> None:
        """Brings everything to the state of the note."""
        for name, buffer in self.buffers.items():
            if name in note.buffers:
                version, contents = note.buffers[name]
                if note.taken_by is not self or _small(buffer) or buffer._version != version:
                    with torch.no_grad():
                        buffer.copy_(contents)
                    note.buffers[name] = (buffer._version, contents)
        note.taken_by = self
        for part, targets in ((note.local, self.local), (note.shared, self.shared)):
            for name, target in targets.items():
                if name in part:
                    write_object(target, part[name])
        write_generators(note.generators)

    def is_in_local(self, note: SmallState) -> bool:
        """Whether the local part of a note of this taker is the state now. Only where it is the generators alone, for
        anything else has to be copied to be compared."""
        plain = note.taken_by is self and not self.buffers and not self.local
        return plain and note.generators is read_generators()

    def same_local(self, one: SmallState, other: SmallState) -> bool:
        """Whether the local parts of two notes of this taker are equal."""
        return (
            same(one.generators, other.generators)
            and same(one.local, other.local)
            and (not self.buffers or self._same_buffers(one, other))
        )

    def _same_buffers(self, one: SmallState, other: SmallState) -> bool:
        return all(same(one.buffers[name][1], other.buffers[name][1]) for name in self._recorded)

    def local_bytes(self, note: SmallState) -> bytes:
        """The local part of a note, for the record: the same object as long as it is the same, as it mostly is where
        the host draws no random numbers."""
        plain = not note.local and not self._recorded
        if plain and self._last_bytes is not None and note.generators is self._last_bytes[0]:
            return self._last_bytes[1]
        data = self._bytes(note, {name: note.buffers[name] for name in note.buffers.keys() & self._recorded}, {})
        self._last_bytes = (note.generators, data) if plain else None
        return data

    def whole_bytes(self, note: SmallState) -> bytes:
        """A note as the peer sends it."""
        return self._bytes(note, note.buffers, note.shared)

    def _bytes(
        self, note: SmallState, buffers: Mapping[str, tuple[int, torch.Tensor]], shared: Mapping[str, Any]
    ) -> bytes:
        generators: dict[str, bytes] = {}
        for name, state in note.generators.items():
            known = self._encoded.get(name)
            if known is None or known[0] is not state:
                known = self._encoded[name] = (state, encode(state))
            generators[name] = known[1]
        contents = {name: contents for name, (_, contents) in buffers.items()}
        return encode({"generators": generators, "buffers": contents, "local": note.local, "shared": dict(shared)})

    @staticmethod
    def from_bytes(step: int, data: bytes) -> SmallState:
        """A note as it was written by `local_bytes` or `whole_bytes`. Raises EncodingError."""
        parts = decode(data)
        try:
            buffers = {name: (-1, contents) for name, contents in parts["buffers"].items()}
            generators = {name: decode(state) for name, state in parts["generators"].items()}
            return SmallState(step, generators, buffers, parts["local"], parts["shared"])
        except (KeyError, TypeError, AttributeError) as error:
            raise EncodingError(f"not a note: {error!r}") from None

    def _copy(self, name: str, buffer: torch.Tensor, last: SmallState | None) -> tuple[int, torch.Tensor]:
        version = buffer._version
        known = last.buffers.get(name) if last is not None and last.taken_by is self else None
        if known is not None and known[0] == version and not _small(buffer):
            return known
        return version, buffer.detach().clone()


def _small(buffer: torch.Tensor) -> bool:
    return buffer.nbytes <= _LARGEST_ALWAYS_COPIED


def _is_on_device(buffer: torch.Tensor) -> bool:
    """Whether the host would have to wait for its contents."""
    return buffer.device.type == "cuda"


def _differs(noted: tuple[int, torch.Tensor], buffer: torch.Tensor) -> bool:
    version, contents = noted
    if version != buffer._version:
        return True
    comparable = buffer.device.type == "cpu" and not _is_on_device(buffer)
    return _small(buffer) and comparable and not torch.equal(contents, buffer)
