"""Windows on Mersenne Twisters: a few bytes of memory that show whether a generator has been used.

A draw moves the twister's position, and with every 624th one all its words change; a new seed or state changes the
words. So two states with the same position and the same dozen words are the same state (or differ with a probability
of 2**-384). Those bytes are looked at where they are, which takes 0.2 us instead of the 1 to 30 us of a copy of the
state through the generator's own functions.

Where they are is not part of any interface. It is found by experiment on a generator of the same kind that nobody else
uses, and believed if every kind of draw is then seen; otherwise there is no window, and the state is copied each time.
"""

from __future__ import annotations

import _random
import ctypes
import os
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

Window = tuple[memoryview, ...]
"""Live memory: whoever sees the same bytes as before knows that the twister has not been used since."""

_WORDS = 624
_SEEN_WORDS = 12
_SEED = 20220222


def of_python() -> Window | None:
    """Of `random`'s global generator: the position comes first, then the words. The second of a pair of normal deviates
    is kept elsewhere, in the attribute `gauss_next`: whether it was used up is not seen here."""
    generator: Any = getattr(random.getstate, "__self__", None)
    if type(generator) is not random.Random:
        return None
    probe = random.Random(_SEED)
    draws = [probe.random, lambda: probe.gauss(0, 1), lambda: probe.shuffle([1, 2, 3]), lambda: probe.seed(_SEED)]
    if not _notices(_on_python(probe), draws):
        return None
    return _on_python(generator)


def _on_python(generator: Any) -> Window:
    room = _random.Random.__basicsize__ - object.__basicsize__
    return (_memory(id(generator) + object.__basicsize__, min(4 + 4 * _SEEN_WORDS, room)),)


def of_numpy(bits: Any) -> Window | None:
    """Of a bit generator of numpy, which whoever looks must keep alive: the words, then the position. The second of a
    pair of normal deviates is kept elsewhere: whether it was used up is not seen here."""
    if type(bits).__name__ != "MT19937":
        return None
    import numpy

    probe = type(bits)(_SEED)
    uniform, normal = numpy.random.RandomState(probe).random_sample, numpy.random.Generator(probe).standard_normal
    if not _notices(_on_numpy(probe), [uniform, normal, lambda: probe._legacy_seeding(_SEED)]):
        return None
    return _on_numpy(bits)


def _on_numpy(bits: Any) -> Window:
    begin = 4 * (_WORDS - _SEEN_WORDS)
    return (_memory(bits.ctypes.state_address + begin, 4 * _SEEN_WORDS + 4),)


def of_torch() -> Window | None:
    """Of torch's CPU generator: seed, position, and the words, and after these the deviates that are kept."""
    probe = torch.Generator()
    offset = _offset_of_words(probe)
    if offset is None or _read(_object(probe), 8) != _read(_object(torch.default_generator), 8):  # of one C++ class
        return None
    kinds = [(draw, dtype) for draw in (torch.rand, torch.randn, torch.randn) for dtype in (torch.float, torch.double)]
    draws = [lambda draw=draw, dtype=dtype: draw(1, generator=probe, dtype=dtype) for draw, dtype in kinds]
    if not _notices(_on_torch(probe, offset), [*draws, *draws[::-1], lambda: probe.manual_seed(_SEED)]):
        return None
    return _on_torch(torch.default_generator, offset)


def _on_torch(generator: torch.Generator, offset: int) -> Window:
    words = _object(generator) + offset
    return (_memory(words - 16, 16 + 4 * _SEEN_WORDS), _memory(words + 4 * _WORDS, 24))


def _object(generator: torch.Generator) -> int:
    """The address of the C++ object; 0: not known. A pointer to it is what torch's type adds to a Python object, and
    after that, in newer versions, the list of weak references."""
    pointer, kind = ctypes.sizeof(ctypes.c_void_p), type(generator)
    begin = object.__basicsize__
    references = getattr(kind, "__weakrefoffset__", 0)
    if references not in (0, begin + pointer) or kind.__basicsize__ != begin + pointer * (2 if references else 1):
        return 0
    return ctypes.c_void_p.from_address(id(generator) + begin).value or 0


def _offset_of_words(probe: torch.Generator) -> int | None:
    """Where in its object a generator has its words: they follow from its seed."""
    probe.manual_seed(_SEED)
    memory = _read(_object(probe), 4096)
    offset = memory.find(struct.pack(f"={_WORDS}I", *_seeded_words(_SEED)))
    return offset if 16 <= offset <= len(memory) - 4 * _WORDS - 24 else None


def _seeded_words(seed: int) -> Iterator[int]:
    """Matsumoto's and Nishimura's initialisation of the Mersenne Twister, 2002."""
    word = seed
    for number in range(1, _WORDS + 1):
        yield word
        word = (1812433253 * (word ^ (word >> 30)) + number) & 0xFFFFFFFF


def _read(address: int, length: int) -> bytes:
    """Memory of this process, as far as there is any: less than `length` bytes, or none, where it ends."""
    try:
        fd = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(fd, length, address)
        finally:
            os.close(fd)
    except OSError:
        return b""


def _memory(address: int, length: int) -> memoryview:
    return memoryview((ctypes.c_ubyte * length).from_address(address)).cast("B")


def _notices(window: Window, draws: Sequence[Callable[[], object]]) -> bool:
    """Whether every one of these changes what is seen, and nothing else does."""
    for draw in draws:
        before = [bytes(view) for view in window]
        if [bytes(view) for view in window] != before:
            return False
        draw()
        if [bytes(view) for view in window] == before:
            return False
    return True
