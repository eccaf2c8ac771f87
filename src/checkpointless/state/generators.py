"""The process-wide random number generators: torch's, CUDA's, numpy's and Python's, looked at three times in a step.

A step that draws nothing on the host leaves them as they are. In the midst of training, when nothing of this is in the
processor's caches, reading three Mersenne Twisters takes 150 us; so it is seen from a few bytes of each whether it has
been used (`twisters.py`), and states that have not changed are given as the same object: everybody downstream compares
by identity.
"""

from __future__ import annotations

import operator
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch

from . import twisters
from .stateful import same
from .twisters import Window

States = dict[str, Any]
"""By generator: its state, as that generator's own functions give and take it. Not to be changed."""


class _Generators:
    """Those in use in this process, and what their windows showed when they were last read."""

    def __init__(self) -> None:
        self._windows: Window | None = None
        """Of the twisters, together. None: not opened yet. Empty: one of them has none."""
        self._shown: list[object] = []
        """Empty: to be read again, whatever the windows show."""
        self._states: States = {}
        self._python: Any = getattr(random.getstate, "__self__", None)
        self._numpy: Any = None
        """The module, once somebody has imported it."""
        self._bits: Any = None
        """The bit generator of numpy's global generator."""

    def states(self) -> States:
        """The same object as long as none of them is used."""
        if self._windows is None or self._are_others():
            self._windows = self._open()
        shown: list[object] = list(map(bytes, self._windows))
        if shown:
            shown.append(self._python.gauss_next)
        if not shown or shown != self._shown or torch.cuda.is_initialized():
            self._read(shown)
        return self._states

    def look_again(self) -> None:
        """States have been set."""
        self._shown = []

    def _are_others(self) -> bool:
        if self._numpy is None:
            return "numpy" in sys.modules
        return self._numpy.random.mtrand._rand._bit_generator is not self._bits

    def _open(self) -> Window:
        self._shown = []
        self._numpy = sys.modules.get("numpy")
        windows = [twisters.of_torch(), twisters.of_python()]
        if self._numpy is not None:
            self._bits = self._numpy.random.mtrand._rand._bit_generator
            windows.append(twisters.of_numpy(self._bits))
        return () if None in windows else tuple(view for window in windows for view in window or ())

    def _read(self, shown: list[object]) -> None:
        states = dict(self._states)
        if not shown or shown != self._shown:
            states = {"torch": torch.get_rng_state(), "python": random.getstate()}
            if self._numpy is not None:
                states["numpy"] = self._numpy.random.get_state(legacy=False)
                if states["numpy"]["has_gauss"]:  # the other one of a pair: it is used up without being seen
                    shown = []
        if torch.cuda.is_initialized():
            states["cuda"] = torch.cuda.get_rng_state()
        last = self._states
        kept = {
            name: last[name] if name in last and same(last[name], state) else state for name, state in states.items()
        }
        if kept.keys() != last.keys() or not all(map(operator.is_, kept.values(), last.values())):
            self._states = kept
        self._shown = shown


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
