"""Getting the main thread out of user code: one exception, delivered there and nowhere else.

The monitor thread asks for an interrupt with a signal to the main thread; the signal's handler raises `Interrupted`, a
BaseException, so that `except Exception` does not stop it. The gate decides whether the handler may raise: only
between `enter` and `leave`, never inside a critical section, and once, unless user code swallowed it.

A swallowed exception (a bare `except:`, a `__del__`) is noticed without guessing: its object is freed while user code
still runs. Then it is raised again, at the very next bytecode.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import signal
import sys
import threading
import time
import weakref
from typing import Any

INTERRUPT_SIGNAL = signal.SIGRTMIN + 5
"""A real-time signal that neither libc nor Python uses; user code keeps all the ordinary ones."""

# libc's raise(), called by a weak reference when an exception object is freed: a Python function there would be the
# very frame in which the signal's handler runs next. The reference itself, its only further argument, is ignored.
_raise_signal = ctypes.CDLL(None)["raise"]
_raise_signal.argtypes = [ctypes.c_int, ctypes.py_object]
_raise_on_freed = functools.partial(_raise_signal, INTERRUPT_SIGNAL)

_FIRST_SECTION_LIMIT_S = 1.0
_SHORTEST_SECTION_LIMIT_S = 0.05
_SECTION_LIMIT_FACTOR = 4.0


class Interrupted(BaseException):
    """The epoch has failed elsewhere; this process leaves user code to join the next one. Do not catch it."""


class _Where(enum.Enum):
    OUTSIDE = 0
    INSIDE = 1
    UNWINDING = 2
    """Inside, and `Interrupted` is on its way out."""


class InterruptGate:
    """Between the monitor thread, which wants the main thread out, and user code. One per process."""

    def __init__(self) -> None:
        self._where = _Where.OUTSIDE
        self._wanted = False
        self._depth = 0
        self._entered_at = 0.0
        self._longest_section = 0.0
        self._section_left = threading.Event()
        self._watching_section = False
        self._main_ident = threading.main_thread().ident
        self._raised: weakref.ref[Interrupted] | None = None

    # ---- main thread ---------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Takes the signal. Call it on the main thread before the first `enter`."""
        signal.signal(INTERRUPT_SIGNAL, self._on_signal)
        shown = sys.unraisablehook

        def hook(unraisable: Any) -> None:
            if unraisable.exc_type is not Interrupted:  # ours comes again, there is nothing to show
                shown(unraisable)

        sys.unraisablehook = hook

    def enter(self) -> None:
        """User code begins. Raises Interrupted when that is wanted already."""
        self._where = _Where.INSIDE
        if self._wanted:
            self._raise()

    def leave(self) -> None:
        """User code is over: from here on nothing is raised. Harmless when repeated."""
        self._where = _Where.OUTSIDE
        if self._watching_section:
            self._section_left.set()

    def reset(self) -> None:
        """A new epoch begins: what was wanted for the last one is void, and so are its critical sections."""
        self._where = _Where.OUTSIDE
        self._wanted = False
        self._depth = 0
        self._raised = None

    def enter_section(self) -> None:
        """A critical section begins: an interrupt waits until its end. Sections nest."""
        if self._depth == 0:
            self._entered_at = time.monotonic()
        self._depth += 1

    def leave_section(self) -> None:
        """Raises Interrupted at the end of the outermost section when one came meanwhile."""
        if self._depth == 0:  # the epoch was reset meanwhile
            return
        if self._depth > 1:
            self._depth -= 1
            return
        self._longest_section = max(self._longest_section, time.monotonic() - self._entered_at)
        if self._watching_section:
            self._section_left.set()  # still inside: an interrupt in there would leave the event's lock taken
        self._depth = 0
        if self._wanted and self._where is _Where.INSIDE:
            self._raise()

    # ---- monitor thread ------------------------------------------------------------------------------------------

    def wait_for_section(self, limit: float) -> bool:
        """Gives a critical section the time it needs: True once the main thread is in none.

        What it needs is known from the sections before it; one that takes several times as long is stuck, most
        likely in a collective that only the abort can end. `limit` bounds the wait in any case (seconds).
        """
        self._section_left.clear()
        self._watching_section = True
        try:
            if self._depth == 0 or self._where is _Where.OUTSIDE:
                return True
            usual = self._longest_section
            patience = max(_SHORTEST_SECTION_LIMIT_S, _SECTION_LIMIT_FACTOR * usual)
            return self._section_left.wait(min(limit, patience if usual else _FIRST_SECTION_LIMIT_S))
        finally:
            self._watching_section = False

    def request(self) -> None:
        """The main thread is to leave user code; when it is not in it, `enter` will raise."""
        self._wanted = True
        self._signal_main()

    def insist(self, *, force: bool) -> None:
        """Asks again, in case the last signal came too early for a call that blocks.

        With `force` also when the exception still exists: user code may have put it away instead of letting it pass.
        """
        if force and self._where is _Where.UNWINDING:
            self._where = _Where.INSIDE
        self._signal_main()

    # ---- inside --------------------------------------------------------------------------------------------------

    def _signal_main(self) -> None:
        if self._where is not _Where.OUTSIDE and self._main_ident is not None:
            signal.pthread_kill(self._main_ident, INTERRUPT_SIGNAL)

    def _on_signal(self, signum: int, frame: object) -> None:
        if self._wanted and self._depth == 0 and (self._where is _Where.INSIDE or self._swallowed()):
            self._raise()

    def _swallowed(self) -> bool:
        return self._where is _Where.UNWINDING and self._raised is not None and self._raised() is None

    def _raise(self) -> None:
        self._where = _Where.UNWINDING
        interrupted = Interrupted("the epoch has failed on another rank")
        self._raised = weakref.ref(interrupted, _raise_on_freed)
        try:
            raise interrupted
        finally:
            del interrupted  # or its own traceback would keep it alive
