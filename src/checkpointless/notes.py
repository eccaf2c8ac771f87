"""Notes: what a step touches besides parameters and optimizer state, kept as of the step's beginning.

Random generators, buffers that the forward pass changes, the data position, schedulers, the gradient scaler and the
optimizers' hyperparameters. An interrupted step is repeated from its note and thus repeated exactly.
A note has two parts. The *local* one is known to this rank only and goes into its record (`record.py`) too; the
*shared* one is equal on all replicas and comes from the peer.
"""

from __future__ import annotations

import _random
import copy
import ctypes
import operator
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .encoding import EncodingError, decode, encode

_LARGEST_RECORDED_BUFFERS = 8 << 20
"""So many bytes of buffers, together, are written into the record at most, at every step: the small ones first."""
_LARGEST_ALWAYS_COPIED = 256 << 10
"""Buffers up to this size are copied and compared themselves: batch norm changes its statistics without counting that
as a version. Larger ones (masks, tables of rotary embeddings) are believed when their version says they are the same.
"""


_IMMUTABLE = frozenset({type(None), bool, int, float, str, bytes})


@dataclass
class Note:
    """The state before pass `step` of the loop, less parameters and optimizer state."""

    step: int
    generators: dict[str, Any]
    buffers: dict[str, tuple[int, torch.Tensor]] = field(default_factory=dict)
    """By name: the version counter of the buffer and a copy of its contents."""
    local: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    taken_by: NoteTaker | None = None
    """Whose buffers the version counters belong to; None for a note that came from elsewhere."""


class NoteTaker:
    """Takes notes of registered objects, and puts them back."""

    def __init__(self) -> None:
        self._encoded: dict[str, tuple[object, bytes]] = {}
        """By generator: a state and its encoding; most states stay what they were."""
        self.buffers: dict[str, torch.Tensor] = {}
        self.local: dict[str, Any] = {}
        self.shared: dict[str, Any] = {}
        self._recorded: frozenset[str] = frozenset()
        self._last_bytes: tuple[tuple[object, ...], bytes] | None = None
        """Of the last note: the states of the generators, and all of it encoded."""

    def set_buffers(self, buffers: Mapping[str, torch.Tensor]) -> None:
        """The buffers to note. The large ones (masks, tables) are left out of the record; so are those of a GPU, which
        would have to be waited for at every step. A successor has them from a replica."""
        self.buffers = dict(buffers)
        recorded, room = set(), _LARGEST_RECORDED_BUFFERS
        for name, buffer in sorted(self.buffers.items(), key=lambda item: item[1].nbytes):
            if buffer.device.type == "cpu" and buffer.nbytes <= room:
                recorded.add(name)
                room -= buffer.nbytes
        self._recorded = frozenset(recorded)

    def take(self, step: int, last: Note | None = None, *, local_only: bool = False) -> Note:
        """The state now. What has not changed since `last` is not copied again."""
        shared = {} if local_only else self.shared
        return Note(
            step,
            read_generators(),
            {name: self._copy(name, buffer, last) for name, buffer in self.buffers.items()},
            {name: read_object(target) for name, target in self.local.items()},
            {name: read_object(target) for name, target in shared.items()},
            self,
        )

    def changed(self, note: Note) -> bool:
        """Whether anything differs from the note."""
        return (
            note.taken_by is not self
            or any(_differs(note.buffers[name], buffer) for name, buffer in self.buffers.items())
            or not _same(note.generators, read_generators())
            or any(not _same(note.local[name], read_object(target)) for name, target in self.local.items())
            or any(not _same(note.shared[name], read_object(target)) for name, target in self.shared.items())
        )

    def put_back(self, note: Note) -> None:
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

    def same_local(self, one: Note, other: Note) -> bool:
        """Whether the local parts of two notes of this taker are equal."""
        return (
            _same(one.generators, other.generators)
            and _same(one.local, other.local)
            and all(_same(one.buffers[name][1], other.buffers[name][1]) for name in self.buffers)
        )

    def local_bytes(self, note: Note) -> bytes:
        """The local part of a note, for the record: the same object as long as it is the same, as it mostly is where
        the host draws no random numbers."""
        states = tuple(note.generators.values())
        plain = not note.local and not self._recorded
        if plain and self._last_bytes is not None and _identical(states, self._last_bytes[0]):
            return self._last_bytes[1]
        data = self._bytes(note, {name: note.buffers[name] for name in note.buffers.keys() & self._recorded}, {})
        self._last_bytes = (states, data) if plain else None
        return data

    def whole_bytes(self, note: Note) -> bytes:
        """A note as the peer sends it."""
        return self._bytes(note, note.buffers, note.shared)

    def _bytes(self, note: Note, buffers: Mapping[str, tuple[int, torch.Tensor]], shared: Mapping[str, Any]) -> bytes:
        generators: dict[str, bytes] = {}
        for name, state in note.generators.items():
            known = self._encoded.get(name)
            if known is None or known[0] is not state:
                known = self._encoded[name] = (state, encode(state))
            generators[name] = known[1]
        contents = {name: contents for name, (_, contents) in buffers.items()}
        return encode({"generators": generators, "buffers": contents, "local": note.local, "shared": dict(shared)})

    @staticmethod
    def from_bytes(step: int, data: bytes) -> Note:
        """A note as it was written by `local_bytes` or `whole_bytes`. Raises EncodingError."""
        parts = decode(data)
        try:
            buffers = {name: (-1, contents) for name, contents in parts["buffers"].items()}
            generators = {name: decode(state) for name, state in parts["generators"].items()}
            return Note(step, generators, buffers, parts["local"], parts["shared"])
        except (KeyError, TypeError, AttributeError) as error:
            raise EncodingError(f"not a note: {error!r}") from None

    def _copy(self, name: str, buffer: torch.Tensor, last: Note | None) -> tuple[int, torch.Tensor]:
        version = buffer._version
        known = last.buffers.get(name) if last is not None and last.taken_by is self else None
        if known is not None and known[0] == version and not _small(buffer):
            return known
        return version, buffer.detach().clone()


def _identical(some: tuple[object, ...], others: tuple[object, ...]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _small(buffer: torch.Tensor) -> bool:
    return buffer.nbytes <= _LARGEST_ALWAYS_COPIED


def _differs(noted: tuple[int, torch.Tensor], buffer: torch.Tensor) -> bool:
    version, contents = noted
    if version != buffer._version:
        return True
    return _small(buffer) and buffer.device.type == "cpu" and not torch.equal(contents, buffer)


class _NumpyGenerator:
    """numpy's global generator. Reading its state takes 25 us, seeing that it has not changed 1 us."""

    _BYTES = 624 * 4 + 4
    """Of the Mersenne Twister: its words and the position in them."""

    def __init__(self) -> None:
        self._seen: tuple[bytes, dict[str, Any]] | None = None

    def read(self, numpy: Any) -> dict[str, Any]:
        generator = numpy.random.mtrand._rand._bit_generator
        raw = ctypes.string_at(generator.ctypes.state_address, self._BYTES)
        # A kept second normal deviate is not in those bytes; it can only be used up, and only where there was one.
        known = self._seen is not None and self._seen[0] == raw and not self._seen[1]["has_gauss"]
        if not known or type(generator).__name__ != "MT19937":
            self._seen = (raw, numpy.random.get_state(legacy=False))
        assert self._seen is not None
        return self._seen[1]

    def forget(self) -> None:
        """The state has been set: a deviate that had been used up may be there again, with the same words."""
        self._seen = None


_numpy_generator = _NumpyGenerator()


class _PythonGenerator:
    """Python's global generator. Reading its state takes 8 us, seeing that it has not changed 1 us.

    The same object is given as long as nothing changes, so that it is encoded once.
    """

    def __init__(self) -> None:
        self._seen: tuple[bytes, object, tuple[Any, ...]] | None = None
        self._tells = _raw_state_tells()

    def read(self) -> tuple[Any, ...]:
        generator: Any = getattr(random.getstate, "__self__", None)
        if not self._tells or type(generator) is not random.Random:
            return random.getstate()
        raw, kept_deviate = _raw_state(generator), vars(generator)["gauss_next"]
        if self._seen is None or self._seen[:2] != (raw, kept_deviate):
            self._seen = (raw, kept_deviate, random.getstate())
        return self._seen[2]


def _raw_state(generator: random.Random) -> bytes:
    """The words of CPython's Mersenne Twister and the position in them: what its C type adds to an object."""
    begin = object.__basicsize__
    return ctypes.string_at(id(generator) + begin, _random.Random.__basicsize__ - begin)


def _raw_state_tells() -> bool:
    """Whether those bytes are, in this interpreter, all that changes with a draw."""
    probe = random.Random(0)
    states, raws = [probe.getstate()], [_raw_state(probe)]
    for _ in range(3):
        probe.random()
        states.append(probe.getstate())
        raws.append(_raw_state(probe))
    probe.setstate(states[1])
    return len(set(raws)) == len(states) and _raw_state(probe) == raws[1]


_python_generator = _PythonGenerator()
_last_torch_state = torch.empty(0, dtype=torch.uint8)


def _torch_state() -> torch.Tensor:
    """Torch's CPU generator; the same object as long as it does not change, so that it is encoded once."""
    global _last_torch_state
    state = torch.get_rng_state()
    if not torch.equal(state, _last_torch_state):
        _last_torch_state = state
    return _last_torch_state


def read_generators() -> dict[str, Any]:
    """The states of the process-wide random number generators that are in use."""
    states: dict[str, Any] = {"torch": _torch_state(), "python": _python_generator.read()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        states["numpy"] = _numpy_generator.read(numpy)
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def write_generators(states: Mapping[str, Any]) -> None:
    """Puts them back; one that was not in use when they were read is left as it is."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    numpy = sys.modules.get("numpy")
    if numpy is not None and "numpy" in states:
        numpy.random.set_state(states["numpy"])
        _numpy_generator.forget()
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def read_object(target: Any) -> Any:
    """The state of a registered object, as a value of its own that does not change with it."""
    if isinstance(target, torch.Generator):
        return target.get_state()
    if isinstance(target, random.Random):
        return target.getstate()
    if isinstance(target, torch.optim.Optimizer):
        return [{key: value for key, value in group.items() if key != "params"} for group in target.param_groups]
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(target, numpy.random.Generator):
        return _copy(target.bit_generator.state)
    return _copy(target.state_dict())


def write_object(target: Any, state: Any) -> None:
    """Brings a registered object to that state."""
    if isinstance(target, torch.Generator):
        target.set_state(state)
    elif isinstance(target, random.Random):
        target.setstate(state)
    elif isinstance(target, torch.optim.Optimizer):
        for group, values in zip(target.param_groups, state, strict=True):
            _update_group(group, values)
    elif hasattr(target, "bit_generator"):
        target.bit_generator.state = state
    else:
        target.load_state_dict(_copy(state))


def _update_group(group: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Hyperparameters into a parameter group; a tensor (a capturable learning rate) stays the same object."""
    for key, value in values.items():
        if isinstance(group.get(key), torch.Tensor) and isinstance(value, torch.Tensor):
            group[key].copy_(value)
        else:
            group[key] = value


def _copy(value: Any) -> Any:
    """A deep copy; `copy.deepcopy` takes ten times as long for the plain values that states are made of."""
    kind = type(value)
    if kind in _IMMUTABLE:
        return value
    if kind is dict:
        return {key: _copy(item) for key, item in value.items()}
    if kind is list:
        return [_copy(item) for item in value]
    if kind is tuple:
        return tuple([_copy(item) for item in value])
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def _same(one: Any, other: Any) -> bool:
    """Equality of states: dicts, lists and tuples of plain values, tensors and numpy arrays."""
    if one is other:
        return True
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, tuple) and len(one) > 100:  # Python's generator: plain integers, compared at once
        return bool(one == other)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(_same, one, other))
    if type(one).__module__ == "numpy":
        return bool((one == other).all()) if hasattr(one, "all") else bool(one == other)
    return bool(one == other)
