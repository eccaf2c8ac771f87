"""`for epoch in epochs(loader, 3)`: a loop over a prepared loader that goes on with the batch it was interrupted in.

A step is one batch. What the body does after the update belongs to its step; what is done between two epochs, an
evaluation for example, lies between two steps: it is done once, and again only where not all ranks were through.
Skipped batches are loaded, so that workers draw what they drew; without workers each batch finds the generators that it
found the first time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ...checkpointless.errors import UnsupportedStateError
from ...checkpointless.state.generators import read_generators, write_generators
from ...checkpointless.state.stateful import own_copy, read_object, write_object
from .place import Values
from .recovery import Recovery, current


def epochs(loader: Any, stop: int) -> Iterator[int]:
    """The epochs that are left up to `stop`, instead of `range(stop)`.

    `loader`: the prepared one that is iterated in each of them; others may be iterated there as well.
    """
    recovery = current()
    if recovery is None:
        raise RuntimeError("epochs() belongs into a function under @recoverable")
    if not recovery.started:
        raise UnsupportedStateError(
            "epochs() before Accelerator.prepare() was given the optimizer: there is nothing to go on from yet"
        )
    try:
        length = len(loader)
    except TypeError:
        raise UnsupportedStateError(
            "epochs(): the loader has no length, so it cannot be told where an epoch ends; give its data set one"
        ) from None
    return _Loop(recovery, loader, length).epochs(stop)


class _Loop:
    """One loop of a recoverable function, in one of its entries."""

    def __init__(self, recovery: Recovery, loader: Any, length: int) -> None:
        self.loader = loader
        self.inside = False
        """A step is under way."""
        self._recovery = recovery
        self._manager = recovery.manager
        self._length = length
        self._epoch = self._skip = 0
        self._arriving = recovery.step > 0
        self._step = recovery.step
        self._order = self._order_at_begin = _state(loader)
        self._start: Any = None
        """The generators with which the iterator of this epoch began: it draws the seeds of its workers."""
        self._before: Values | None = None
        self._repeats = False
        """This epoch's batches are all done, and what follows them is not."""

    def epochs(self, stop: int) -> Iterator[int]:
        global _looping
        self._go()
        _looping = self
        first = self._epoch
        try:
            for epoch in range(first, stop):
                self._end()  # of a step whose body has left the loop over the batches
                self._epoch = epoch
                yield epoch
            self._end()
        finally:
            if _looping is self:
                _looping = None

    def _go(self) -> None:
        """To where all ranks go on."""
        if not self._arriving:
            return
        _, mine = self._recovery.at()
        self._epoch, self._skip = mine["epoch"], mine["done"]
        self.loader.iteration = self._epoch
        for name, value in mine.get("objects", {}).items():
            write_object(_movers(self._manager)[name], value)
        self._repeats = self._skip >= self._length

    def batches(self, iterate: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """Those of this epoch that are left."""
        _, mine = self._recovery.at()
        begin = self._skip
        if self._arriving and self._repeats:
            self._arriving, self._skip, self._repeats = False, 0, False
            self.loader.iteration = self._epoch + 1
            _set_state(self.loader, mine["order_after"])
            self._order = mine["order_after"]
            self._recovery.repeat()
            self._note_before(mine)
            return
        if self._arriving:
            _set_state(self.loader, mine["order"] if begin else mine["order_after"])
        self._order_at_begin = _state(self.loader)
        iterator = iterate()
        if self._arriving:
            self._recovery.skips(mine["start"] if begin else None)
            self._start = mine["start"] if begin else None
            for number in range(begin):
                if number == begin - 1 and mine["fetch"] is not None:
                    write_generators(mine["fetch"])
                next(iterator)
            self._recovery.arrived()
            self._arriving, self._skip = False, 0
        for number in range(begin, self._length):
            self._begin(number)
            if number == 0:
                self._start = dict(read_generators())
            fetch = dict(read_generators()) if getattr(self.loader, "num_workers", 0) == 0 else None
            batch = next(iterator)
            self._note(number + 1, fetch)
            yield batch
            self._end()
        next(iterator, None)
        self._note_before(self._recovery.place.mine["now"])

    def _begin(self, number: int) -> None:
        place = self._recovery.place
        if self._before is not None:
            now = {**place.mine["now"], "epoch": self._epoch, "done": number}
            place.follow({}, now, self._before)
            self._before = None
        self._manager.begin_step(self._step, settled=True)
        self.inside = True

    def _note(self, done: int, fetch: Any) -> None:
        """Where the loop is when this step is over; before its backward pass."""
        mine: Values = {"epoch": self._epoch, "done": done, "fetch": fetch, "order": self._order_at_begin}
        self._recovery.place.foresee(mine | {"start": self._start, "order_after": _state(self.loader)})

    def _note_before(self, mine: Values) -> None:
        """An epoch's batches are done: what follows, until the next step begins, is done again from here."""
        self._recovery.place.settle({}, {name: value for name, value in mine.items() if name in _NOTED})
        objects = {name: own_copy(read_object(target)) for name, target in _movers(self._manager).items()}
        self._before = {"generators": dict(read_generators()), "objects": objects}

    def _end(self) -> None:
        if self.inside:
            self.inside = False
            self._manager.end_step()
            self._step += 1


_NOTED = ("epoch", "done", "fetch", "start", "order", "order_after")


def _movers(manager: Any) -> dict[str, Any]:
    """What a script may move between two epochs: schedulers, and what it has registered for checkpointing."""
    objects = manager._registered().objects
    return {name: target for name, target in objects.items() if name.startswith(("scheduler", "object"))}


def _state(loader: Any) -> Any:
    """Of the generator that accelerate keeps in step on all ranks, and draws the order of an epoch from."""
    generator = getattr(loader, "synchronized_generator", None)
    return None if generator is None else generator.get_state()


def _set_state(loader: Any, state: Any) -> None:
    if state is not None:
        loader.synchronized_generator.set_state(state)


_looping: _Loop | None = None


def looping() -> _Loop | None:
    """The loop that is under way."""
    return _looping
