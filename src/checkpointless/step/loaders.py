"""The random draws with which data loaders begin: a restarted script makes their iterators again, and draws again.

An iterator over a DataLoader draws a seed for its workers from torch's global generator, and a shuffling sampler that
has no generator of its own draws its order there. In the run without a fault that happened once, steps before the one
to be repeated. So every such beginning is noted with the state that the generator had, as long as what has begun is not
at its end; and where the script begins it anew on its way to the repeated step, it finds that state again: the same
order, the same seeds. What begins in the repeated step itself (nothing was under way) draws as it does anyway.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.utils.data import dataloader, sampler

_SAMPLERS = ("RandomSampler", "SubsetRandomSampler", "WeightedRandomSampler")
"""Those of torch that draw from the global generator when they have none of their own."""

Starts: TypeAlias = tuple[tuple[str, torch.Tensor], ...]
"""What is under way: what it is, and the state of torch's generator when it began (uint8)."""


@dataclass(eq=False)
class _Start:
    """An iterator that has begun. `left`: how much of it is left, 0 at its end."""

    what: str
    state: torch.Tensor
    left: Callable[[], int]


class LoaderStarts:
    """Of the process: torch's classes are told of it once, and it does nothing while no manager listens."""

    def __init__(self) -> None:
        self._installed = False
        self._listening = False
        self._under_way: list[_Start] = []
        self._last: Starts = ()
        self._again: Starts = ()
        self._base: torch.Tensor | None = None
        """In a step that is repeated, before its first forward pass: what its generator began with."""
        self._loader_begun = False
        """The last that has begun was an iterator over a DataLoader: a sampler that begins now is its own."""
        self.begun = 0
        """How many have begun since `repeats`, or `in_step`."""
        self.fresh = 0
        """How many of these were not under way."""

    def listen(self) -> None:
        """Training begins."""
        self._listening = True
        if not self._installed:
            self._installed = True
            _around_init(dataloader._BaseDataLoaderIter, self)
            for name in _SAMPLERS:
                _around_iter(getattr(sampler, name), self)

    def leave(self) -> None:
        """The function is left: what was under way is not any more."""
        self._listening = False
        self._under_way.clear()
        self._last, self._again, self._base = (), (), None

    def under_way(self) -> Starts:
        """What has begun and is not at its end; the same object as long as it is the same."""
        if not self._under_way:
            return ()
        self._under_way = [start for start in self._under_way if start.left() > 0]
        found = tuple((start.what, start.state) for start in self._under_way)
        if len(found) != len(self._last) or any(a[1] is not b[1] for a, b in zip(found, self._last, strict=True)):
            self._last = found
        return self._last

    def repeats(self, starts: Starts) -> None:
        """A restarted script is on its way to the step to be repeated, at which these were under way."""
        self._again, self._base, self.begun, self.fresh = starts, None, 0, 0

    def in_step(self, base: torch.Tensor) -> None:
        """The step to be repeated has begun. `base`: the state of torch's generator, from which a new beginning in it
        draws, whatever was begun and skipped before."""
        self._base, self.begun, self.fresh = base, 0, 0

    def arrived(self) -> None:
        """The repeated step computes: what begins from here on is new."""
        self._again, self._base = (), None

    def begin(self, what: str, left: Callable[[], int], *, within: bool = False) -> None:
        """Something begins, and is about to draw. `within`: most likely as a part of what has begun before it, as the
        order of an iterator over a DataLoader does."""
        if not self._listening:
            return
        self.begun += 1
        state = next((state for known, state in reversed(self._again) if known == what), None)
        self.fresh += state is None
        if state is None and not (within and self._loader_begun):
            state = self._base
        if state is not None:
            torch.set_rng_state(state)
        self._loader_begun = not within
        self._under_way.append(_Start(what, torch.get_rng_state(), left))


STARTS = LoaderStarts()


def _around_init(kind: type, starts: LoaderStarts) -> None:
    """Tells of every new iterator over a DataLoader that draws from the global generator."""
    original = kind.__init__  # type: ignore[misc]

    @functools.wraps(original)
    def init(self: Any, loader: Any, *args: Any, **kwargs: Any) -> None:
        if loader.generator is None:
            alive = weakref.ref(self)
            starts.begin(f"{type(loader).__name__} {_length(loader)}", lambda: _batches_left(alive()))
        original(self, loader, *args, **kwargs)

    kind.__init__ = init  # type: ignore[misc]


def _batches_left(iterator: Any) -> int:
    if iterator is None:
        return 0
    if not hasattr(iterator, "_num_yielded"):
        return 1
    length = _length(iterator._loader) if hasattr(iterator, "_loader") else _own_length(iterator)
    return max(0, length - iterator._num_yielded) if length else 1


def _own_length(iterator: Any) -> int:
    try:
        return len(iterator)
    except TypeError:
        return 0


def _length(loader: Any) -> int:
    """Batches of a DataLoader; 0 where it cannot tell."""
    try:
        return len(loader)
    except TypeError:
        return 0


def _around_iter(kind: type, starts: LoaderStarts) -> None:
    """Tells of every order that a sampler begins to draw from the global generator."""
    original = kind.__iter__  # type: ignore[attr-defined]

    @functools.wraps(original)
    def iterate(self: Any) -> Iterator[int]:
        if self.generator is not None:
            yield from original(self)
            return
        given = [0]
        total = len(self)
        starts.begin(f"{type(self).__name__} {total}", lambda: total - given[0], within=True)
        for index in original(self):
            given[0] += 1
            yield index

    kind.__iter__ = iterate  # type: ignore[attr-defined]
