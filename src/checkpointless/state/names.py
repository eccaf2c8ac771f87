"""What has been registered under which names, and for how long: further calls add, other functions begin anew."""

from __future__ import annotations

from typing import Any


class Names:
    """The objects by name, over the entries of a function and from one function to the next."""

    def __init__(self) -> None:
        self._outside: dict[str, Any] = {}
        """Registered before the function was entered: registered in each of its entries."""
        self._named: dict[str, Any] = {}
        """Registered up to now in this entry, those included."""
        self._inside = self._returned = False

    def with_earlier(self, objects: dict[str, Any]) -> dict[str, Any]:
        """What is registered when these are, too."""
        if self._returned:  # between two functions: what the first one has trained is not the second one's
            self._outside = self._named = {}
            self._inside = self._returned = False
        return {**self._named, **objects}

    def registered(self, objects: dict[str, Any]) -> None:
        self._named = objects
        if not self._inside:
            self._outside = objects

    def entered(self) -> None:
        """A function begins, or begins again."""
        self._named = self._outside
        self._inside, self._returned = True, False

    def returned(self) -> None:
        """The function is over."""
        self._returned = True


def same_objects(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the same names stand for the same objects. Equal ones are not enough: only one of them is trained."""
    return one.keys() == other.keys() and all(one[name] is other[name] for name in one)
