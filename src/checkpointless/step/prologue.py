"""What a wrapped function does before its loop is done again in every restart, with the same random numbers.

A permutation drawn before the loop, or the order of a shuffling DataLoader whose iterator is made there, is in
variables of the function and in nobody's state. It comes out the same if the generators are, at the function's entry,
what they were when it was entered first.
"""

from __future__ import annotations

from typing import Any

from ..state.generators import States, read_generators, write_generators
from ..state.registry import Registry
from ..state.stateful import is_generator, read_object, write_object


class Prologue:
    """The generators as the function found them when it was first entered in this process."""

    def __init__(self) -> None:
        self._states: States = {}
        self._registered: dict[str, tuple[Any, Any]] = {}
        """By name: a registered generator, and its state."""

    def begin(self, registry: Registry | None) -> None:
        """The function is entered for the first time."""
        self._states = read_generators()
        self._registered.clear()
        if registry is not None:
            self.registered(registry)

    def registered(self, registry: Registry) -> None:
        """Generators are registered; those that live through restarts begin again from what they are now."""
        for name, target in registry.taker.local.items():
            if is_generator(target) and (name not in self._registered or self._registered[name][0] is not target):
                self._registered[name] = target, read_object(target)

    def again(self) -> None:
        """The function is entered again."""
        write_generators(self._states)
        for target, state in self._registered.values():
            write_object(target, state)
