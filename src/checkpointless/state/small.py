"""The small state: what a step touches besides parameters and optimizer state, kept as of the step's beginning.

Random generators, buffers that the forward pass changes, modules' extra state, the data position, schedulers, the
gradient scaler and the optimizers' hyperparameters. An interrupted step is repeated from it and thus repeated exactly.
It has two parts. The *local* one is known to this rank only and goes into its record (`step/record.py`) too; the
*shared* one is equal on all replicas and comes from the peer.

An *item* is one piece of the local part: `generator torch`, `buffer model.bn.running_mean`, `local loader`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgspec
import torch

from ...protocol.values import EncodingError, decode, encode, encode_bytes
from .generators import States, read_generators, write_generators
from .stateful import is_generator, is_object_in, own_copy, read_object, same, write_object
from .tensors import local as local_part

_LARGEST_RECORDED_BUFFERS = 8 << 20
"""So many bytes of buffers, together, are written into the record at most, at every step: the small ones first."""
_LARGEST_ALWAYS_COPIED = 256 << 10
"""Buffers up to this size are copied and compared themselves: batch norm changes its statistics without counting that
as a version. Larger ones (masks, tables of rotary embeddings) are believed when their version says they are the same,
until one of them is seen to change without it (`SmallStateTaker.distrust`).
"""

BufferPlaces: TypeAlias = Mapping[str, tuple[Mapping[str, torch.Tensor | None], str]]
"""By name: the module's dictionary in which a buffer is, and its key there."""


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
    """Whose buffers the version counters belong to; None for one that came from elsewhere."""
    forward: States | None = None
    """The generators as the first forward pass of the step found them; None: not known."""
    starts: tuple[tuple[str, torch.Tensor], ...] = ()
    """What data loaders had under way: see `step/loaders.py`."""
    final: bool = True
    """It was noted when the step before had ended; otherwise ahead of that, from its last backward pass on."""
    begun: bool = False
    """The generators are those with which the step itself began, after what a loop drew between two steps."""
    late: frozenset[str] = frozenset()
    """Items that may still change before the step begins: it was noted ahead of time."""

    def items(self) -> Iterator[tuple[str, Any]]:
        """(name, value) of every item of the local part."""
        yield from ((f"generator {name}", state) for name, state in self.generators.items())
        yield from ((f"buffer {name}", contents) for name, (_, contents) in self.buffers.items())
        yield from ((f"local {name}", value) for name, value in self.local.items())
        if self.starts:
            yield "iterators of data loaders", self.starts

    def adopt(self, item: str, other: SmallState) -> None:
        """Takes the value of an item from another one."""
        kind, _, name = item.partition(" ")
        if kind == "generator" and name in other.generators:
            self.generators = {**self.generators, name: other.generators[name]}
        elif kind == "buffer" and name in other.buffers:
            self.buffers[name] = other.buffers[name]
        elif kind == "local" and name in other.local:
            self.local[name] = other.local[name]
        elif kind == "iterators":
            self.starts = other.starts


def differing(one: SmallState, other: SmallState, known: frozenset[str] = frozenset()) -> frozenset[str]:
    """The items, but those `known`, that are not equal in two small states."""
    theirs = dict(other.items())
    return frozenset(
        item
        for item, value in one.items()
        if item not in known and not (item in theirs and (value is theirs[item] or same(value, theirs[item])))
    )


class SmallStateTaker:
    """Takes the small state of registered objects, and puts it back."""

    def __init__(self) -> None:
        self._encoded: dict[str, tuple[object, bytes]] = {}
        """By generator: a state and its encoding; most states stay what they were."""
        self._places: BufferPlaces = {}
        self._untracked: set[str] = set()
        """Large buffers that change without a new version."""
        self.local: dict[str, Any] = {}
        self.shared: dict[str, Any] = {}
        self.extras: dict[str, torch.nn.Module] = {}
        """Modules that have `get_extra_state`, by the name of that state."""
        self.on_device: dict[str, torch.Tensor] = {}
        """The buffers of a GPU that are to be recorded by the device itself."""
        self.starts: Callable[[], tuple[tuple[str, torch.Tensor], ...]] = tuple
        """What data loaders have under way."""
        self.unrecorded: frozenset[str] = frozenset()
        """The buffers that are too large for the record."""
        self._recorded: frozenset[str] = frozenset()
        self._last_bytes: tuple[States, frozenset[str], bytes] | None = None
        """Of the last one that held nothing else: the states of the generators, what is late, and these encoded."""

    def set_buffers(self, places: BufferPlaces) -> None:
        """The buffers to note, wherever their modules have them. Large ones (masks, tables) are left out of the record,
        and so are those of all GPUs but one: a successor has them from a replica."""
        self._places = places
        recorded: set[str] = set()
        on_device: dict[str, torch.Tensor] = {}
        room = _LARGEST_RECORDED_BUFFERS
        buffers = self.buffers()
        for name, buffer in sorted(buffers.items(), key=lambda item: item[1].nbytes):
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
        self.unrecorded = frozenset(buffers.keys() - recorded - on_device.keys())

    def buffers(self) -> dict[str, torch.Tensor]:
        """Those that the modules have now."""
        found: dict[str, torch.Tensor] = {}
        for name, (holder, key) in self._places.items():
            buffer = holder.get(key)
            if buffer is not None:
                found[name] = local_part(buffer)
        return found

    def large_buffers(self) -> dict[str, torch.Tensor]:
        """Those that are believed by their version, and so worth a look now and then."""
        return {
            name: buffer
            for name, buffer in self.buffers().items()
            if not _small(buffer) and name not in self._untracked
        }

    def distrust(self, names: frozenset[str]) -> None:
        """These buffers have been seen to change without a new version: they are copied at every step."""
        self._untracked |= names

    def take(self, step: int, last: SmallState | None = None, *, local_only: bool = False) -> SmallState:
        """The state now. What has not changed since `last` is not copied again."""
        small = SmallState(step, read_generators(), taken_by=self, starts=self.starts())
        if self._places:
            small.buffers = {name: self._copy(name, buffer, last) for name, buffer in self.buffers().items()}
        if self.local or self.extras:
            small.local = self._read_local()
        if not local_only:
            small.shared = {name: read_object(target) for name, target in self.shared.items()}
        return small

    def _read_local(self) -> dict[str, Any]:
        values = {name: read_object(target) for name, target in self.local.items()}
        return values | {name: own_copy(module.get_extra_state()) for name, module in self.extras.items()}

    def changed(self, small: SmallState) -> frozenset[str]:
        """What differs from it: items, and `shared <name>`."""
        if small.taken_by is not self:
            return frozenset({"everything"})
        found: set[str] = set()
        now = read_generators()
        if now is not small.generators:
            found |= {f"generator {name}" for name in now if not same(small.generators.get(name), now[name])}
        for name, buffer in self.buffers().items() if self._places else ():
            if name not in small.buffers or self._differs(name, small.buffers[name], buffer):
                found.add(f"buffer {name}")
        found |= {f"shared {name}" for name, o in self.shared.items() if not is_object_in(o, small.shared.get(name))}
        return frozenset(found | {f"local {name}" for name in self.changed_local(small)})

    def changed_local(self, small: SmallState) -> frozenset[str]:
        """The registered objects of the local part, and extra states, that differ from it."""
        found = {name for name, target in self.local.items() if not is_object_in(target, small.local.get(name))}
        found |= {
            name
            for name, module in self.extras.items()
            if not same(small.local.get(name), own_copy(module.get_extra_state()))
        }
        return frozenset(found)

    def put_back(self, small: SmallState, *, objects: bool = True, generators: bool = True) -> None:
        """Brings everything to that state. `objects`: also registered objects of the local part; a data loader takes a
        second `load_state_dict` for a new beginning. `generators`: also random generators, registered ones too."""
        for name, buffer in self.buffers().items():
            if name in small.buffers:
                self._put_back_buffer(name, buffer, small)
        small.taken_by = self
        for name, target in self.local.items():
            if name in small.local and (generators if is_generator(target) else objects):
                write_object(target, small.local[name])
        for name, module in self.extras.items():
            if name in small.local:
                module.set_extra_state(own_copy(small.local[name]))
        for name, target in self.shared.items():
            if name in small.shared:
                write_object(target, small.shared[name])
        if generators:
            write_generators(small.generators)

    def _put_back_buffer(self, name: str, buffer: torch.Tensor, small: SmallState) -> None:
        version, contents = small.buffers[name]
        believed = small.taken_by is self and buffer._version == version and name not in self._untracked
        if believed and not _small(buffer):
            return
        if buffer.shape == contents.shape and buffer.dtype == contents.dtype:
            with torch.no_grad():
                buffer.copy_(contents)
        else:  # bound to another tensor since, or not yet
            buffer = contents.detach().clone().to(buffer.device)
            holder, key = self._places[name]
            holder[key] = buffer  # type: ignore[index]
        small.buffers[name] = (buffer._version, contents)

    def is_in_local(self, small: SmallState) -> bool:
        """Whether the local part of one of this taker is the state now. Only where it is the generators alone, for
        anything else has to be copied to be compared."""
        plain = small.taken_by is self and not self._places and not self.local and not self.extras
        return plain and small.generators is read_generators() and small.starts is self.starts()

    def same_local(self, one: SmallState, other: SmallState) -> bool:
        """Whether the local parts of two of this taker are equal, as far as they are recorded."""
        return (
            one.late == other.late
            and one.starts is other.starts
            and _are_generators_of(one.generators, other.generators)
            and same(one.local, other.local)
            and (not self._places or self._same_buffers(one, other))
        )

    def _same_buffers(self, one: SmallState, other: SmallState) -> bool:
        return all(
            name in one.buffers and same(one.buffers[name][1], other.buffers[name][1])
            for name in self._recorded & other.buffers.keys()
        )

    def local_bytes(self, small: SmallState) -> bytes:
        """The local part, for the record: the same object as long as it is the same, as it mostly is where the host
        draws no random numbers."""
        plain = not small.local and not self._recorded and small.forward is None and not small.starts
        last = self._last_bytes
        if plain and last is not None and last[0] is small.generators and last[1] == small.late:
            return last[2]
        recorded = (
            {name: small.buffers[name] for name in small.buffers.keys() & self._recorded} if small.buffers else {}
        )
        data = self._bytes(small, recorded, {})
        self._last_bytes = (small.generators, small.late, data) if plain else None
        return data

    def whole_bytes(self, small: SmallState) -> bytes:
        """All of it, as the peer sends it."""
        return self._bytes(small, small.buffers, small.shared)

    def _bytes(
        self, small: SmallState, buffers: Mapping[str, tuple[int, torch.Tensor]], shared: Mapping[str, Any]
    ) -> bytes:
        parts = {
            "generators": self._encode_generators(small.generators),
            "forward": None if small.forward is None else self._encode_generators(small.forward),
            "step": small.step,
            "final": small.final,
            "begun": small.begun,
            "late": sorted(small.late),
            "buffers": {name: contents for name, (_, contents) in buffers.items()},
            "local": small.local,
            "shared": dict(shared),
            "starts": list(map(list, small.starts)),
        }
        if buffers or small.local or shared or small.starts:
            return encode(parts)
        return msgspec.msgpack.encode(parts)  # plain values as they are, in the midst of a step

    def _encode_generators(self, states: States) -> dict[str, bytes]:
        generators: dict[str, bytes] = {}
        for name, state in states.items():
            known = self._encoded.get(name)
            if known is None or known[0] is not state:
                known = self._encoded[name] = (state, _encode_state(state))
            generators[name] = known[1]
        return generators

    @staticmethod
    def from_bytes(step: int, data: bytes) -> SmallState:
        """One as it was written by `local_bytes` or `whole_bytes`. Raises EncodingError."""
        parts = decode(data)
        try:
            buffers = {name: (-1, contents) for name, contents in parts["buffers"].items()}
            generators = {name: decode(state) for name, state in parts["generators"].items()}
            forward = parts["forward"]
            if forward is not None:
                forward = {name: decode(state) for name, state in forward.items()}
            small = SmallState(step, generators, buffers, parts["local"], parts["shared"], forward=forward)
            small.late = frozenset(parts["late"])
            small.begun = bool(parts["begun"])
            small.final = bool(parts["final"]) and parts["step"] == step
            small.starts = tuple((what, state) for what, state in parts["starts"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EncodingError(f"not a small state: {error!r}") from None
        return small

    def _copy(self, name: str, buffer: torch.Tensor, last: SmallState | None) -> tuple[int, torch.Tensor]:
        version = buffer._version
        known = last.buffers.get(name) if last is not None and last.taken_by is self else None
        believed = not _small(buffer) and name not in self._untracked
        if known is not None and believed and known[0] == version and known[1].shape == buffer.shape:
            return known
        return version, buffer.clone()

    def _differs(self, name: str, noted: tuple[int, torch.Tensor], buffer: torch.Tensor) -> bool:
        version, contents = noted
        if version != buffer._version or contents.shape != buffer.shape:
            return True
        comparable = buffer.device.type == "cpu" and not _is_on_device(buffer)
        return comparable and (_small(buffer) or name in self._untracked) and not torch.equal(contents, buffer)


def _are_generators_of(one: States, other: States) -> bool:
    """Whether two states read in this process are equal: what has not changed is the same object."""
    return one is other or (one.keys() == other.keys() and all(one[name] is other[name] for name in one))


def _encode_state(state: Any) -> bytes:
    """Of one generator."""
    if isinstance(state, torch.Tensor) and state.dtype is torch.uint8 and state.dim() == 1 and not state.is_cuda:
        return encode_bytes(state)
    return encode(state)


def _small(buffer: torch.Tensor) -> bool:
    return buffer.nbytes <= _LARGEST_ALWAYS_COPIED


def _is_on_device(buffer: torch.Tensor) -> bool:
    """Whether the host would have to wait for its contents."""
    return buffer.device.type == "cuda"
