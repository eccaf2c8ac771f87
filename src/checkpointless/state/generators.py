"""The process-wide random number generators: torch's, CUDA's, numpy's and Python's, looked at three times in a step.

A step that draws nothing on the host leaves them as they are. In the midst of training, when nothing of this is in the
processor's caches, reading three Mersenne Twisters takes 150 us; so it is seen from a few bytes of each whether it has
been used (`twisters.py`), and states that have not changed are given as the same object: everybody downstream compares
by identity.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import twisters
from .stateful import same
from .twisters import Window

States = dict[str, Any]
"""By generator: its state, as that generator's own functions give and take it. Not to be changed."""


class _Twister:
    """One of the host's generators: its state, read again only when its window shows that it has been used."""

    def __init__(self, read: Callable[[], Any], window: Window | None, beside: Callable[[], object] | None) -> None:
        self._read = read
        self.window = window
        self._beside = beside
        """The rest of what tells, which is not in the window."""
        self._shown: object = None
        """None: to be read again, whatever the window shows."""
        self.state: Any = None

    def look(self) -> bool:
        """Brings `state` up to date; whether it is another one than before."""
        window = self.window
        if window is not None:
            shown = b"".join(window) if self._beside is None else (b"".join(window), self._beside())
            if shown == self._shown:
                return False
            self._shown = shown
        state = self._read()
        if self.state is not None and same(self.state, state):
            return False
        self.state = state
        return True

    def look_again(self) -> None:
        """A state has been set."""
        self._shown = None

    @property
    def certain(self) -> bool:
        """Whether its window, and nothing else, tells that it has been used since."""
        return self._shown is not None


class _Numpy(_Twister):
    """numpy's: the second of a pair of normal deviates can be used up without being seen in the window."""

    def look(self) -> bool:
        found = super().look()
        if self.state["has_gauss"]:
            self._shown = None
        return found


class _Generators:
    """Those in use in this process."""

    def __init__(self) -> None:
        self._twisters: dict[str, _Twister] = {}
        """By name; empty: not opened yet."""
        self._states: States = {}
        self._numpy: Any = None
        """The module, once somebody has imported it."""
        self._bits: Any = None
        """The bit generator of numpy's global generator."""
        self._python: Any = getattr(random.getstate, "__self__", None)
        self._windows: tuple[memoryview, ...] = ()
        """Of all of them: most of the time none has been used, and this is to be seen at once."""
        self._shown: bytes | None = None
        self._gauss: float | None = None

    def states(self) -> States:
        """The same object as long as none of them is used."""
        if not self._twisters or self._are_others():
            self._open()
        shown = b"".join(self._windows)
        if shown == self._shown and self._gauss is self._beside() and not torch.cuda.is_initialized():
            return self._states
        changed = [name for name, twister in self._twisters.items() if twister.look()]
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        if changed or (cuda is not None and not same(self._states.get("cuda"), cuda)):
            self._states = {name: twister.state for name, twister in self._twisters.items()}
            if cuda is not None:
                self._states["cuda"] = cuda
        certain = all(twister.certain for twister in self._twisters.values())
        self._shown, self._gauss = shown if certain else None, self._beside()
        return self._states

    def look_again(self) -> None:
        """States have been set."""
        self._shown = None
        for twister in self._twisters.values():
            twister.look_again()

    def _beside(self) -> float | None:
        """The second of a pair of normal deviates of Python's generator, which is not in its window."""
        return getattr(self._python, "gauss_next", None)

    def _are_others(self) -> bool:
        if self._numpy is None:
            return "numpy" in sys.modules
        return self._numpy.random.mtrand._rand._bit_generator is not self._bits

    def _open(self) -> None:
        self._shown = None
        self._twisters = {
            "torch": _Twister(torch.get_rng_state, twisters.of_torch(), None),
            "python": _Twister(random.getstate, twisters.of_python(), self._beside),
        }
        self._numpy = sys.modules.get("numpy")
        if self._numpy is not None:
            self._bits = self._numpy.random.mtrand._rand._bit_generator
            window = twisters.of_numpy(self._bits)
            self._twisters["numpy"] = _Numpy(lambda: self._numpy.random.get_state(legacy=False), window, None)
        self._windows = tuple(view for twister in self._twisters.values() for view in twister.window or ())


_generators = _Generators()


def read_generators() -> States:
    """The states of those that are in use; the same object as long as none of them is used."""
    return _generators.states()


def write_generators(states: Mapping[str, Any]) -> None:
    """Puts them back; one that was not in use when they were read is left as it is."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    numpy = sys.modules.get("numpy")
    if numpy is not None and "numpy" in states:
        numpy.random.set_state(states["numpy"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    _generators.look_again()
