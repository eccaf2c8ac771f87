"""`result(value)`: a script says what it has computed; `hyperpodrun verify` need not guess it from its output."""

from __future__ import annotations

import os
from typing import TypeVar

from .settings import trace_directory

T = TypeVar("T")


def result(value: T, name: str = "result") -> T:
    """Declares a result of this rank; of several with one name the last counts. Gives the value back.

    Does nothing unless the run is traced. A value is what a `state_dict` may hold: numbers, text, lists, dicts,
    tensors, arrays.
    """
    directory = trace_directory()
    if directory is not None:
        from .digests import digests
        from .trace import write_line

        write_line(directory, int(os.environ.get("RANK", "0")), {"result": name, "digests": digests(name, value)})
    return value
