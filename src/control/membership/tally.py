"""Who has answered, counted: whether they are a quorum is known at once, however many there are. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from .members import Configuration


class Tally:
    """The agents that have said something, as a part of each configuration that must agree. One more costs O(1)."""

    def __init__(
        self, configurations: Iterable[Configuration], min_nodes: int | None, keys: Iterable[str] = ()
    ) -> None:
        self._asked = list({id(configuration): configuration for configuration in configurations}.values())
        self._missing = [configuration.quorum(min_nodes) for configuration in self._asked]
        self._keys: set[str] = set()
        for key in keys:
            self.add(key)

    def add(self, key: str) -> None:
        if key not in self._keys:
            self._keys.add(key)
            self._count(key, 1)

    def discard(self, key: str) -> None:
        if key in self._keys:
            self._keys.remove(key)
            self._count(key, -1)

    @property
    def missing(self) -> int:
        """So many more are needed, at least."""
        return max([0, *self._missing])

    @property
    def is_quorum(self) -> bool:
        """Whether they may act for every one of the configurations."""
        return self.missing == 0

    def is_quorum_of(self, configuration: Configuration) -> bool:
        """Of this one of them."""
        return any(
            one is configuration and missing <= 0 for one, missing in zip(self._asked, self._missing, strict=True)
        )

    def _count(self, key: str, more: int) -> None:
        for index, configuration in enumerate(self._asked):
            if key in configuration.by_key:
                self._missing[index] -= more
