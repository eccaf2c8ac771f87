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
from collections.abc import Callable
from types import FrameType
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
_PASS_LIMIT_S = 5.0


def is_on_stack(wanted: FrameType, top: FrameType | None) -> bool:
    """Whether a frame is among those that led to `top`."""
    while top is not None:
        if top is wanted:
            return True
        top = top.f_back
    return False


_JOINS = (("threading.py", "_shutdown"), ("multiprocessing/util.py", "_exit_function"))
_JOINED = ("threading.py", "multiprocessing/process.py")


def joins_at_the_end(frame: FrameType | None) -> bool:
    """Whether this is the main thread's frame when its script is over and Python joins threads and children."""
    while frame is not None and frame.f_back is not None:
        frame = frame.f_back
    return frame is not None and any(
        frame.f_code.co_name == name and frame.f_code.co_filename.endswith(file) for file, name in _JOINS
    )


def joined_in_a_handler(frame: FrameType | None) -> list[object]:
    """The threads and children whose end is waited for on the main thread's stack when its script is over: by what the
    script has registered with atexit."""
    joined: list[object] = []
    while frame is not None and not threading.main_thread().is_alive():
        if frame.f_code.co_name == "join" and frame.f_code.co_filename.endswith(_JOINED):
            joined.append(frame.f_locals.get("self"))
        frame = frame.f_back
    return joined


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
        self._owners: list[FrameType | None] = []
        """One for each critical section: the frame with which it is over at the latest, if that is known."""
        self.pass_open = False
        """A pass of a training loop has begun to change things and is to be finished."""
        self._pass_opened_at = 0.0
        self._pass_patience = _FIRST_SECTION_LIMIT_S
        self._longest_pass = 0.0
        self._entered_at = 0.0
        self._longest_section = 0.0
        self._section_left = threading.Event()
        self._watching_section = False
        self._main_ident = threading.main_thread().ident
        self._raised: weakref.ref[Interrupted] | None = None
        self._waits: Callable[[FrameType | None], bool] = lambda frame: False
        """Whether the main thread is to be taken out of what it does at its end."""

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
        self.pass_open = False
        if self._watching_section:
            self._section_left.set()

    def reset(self) -> None:
        """A new epoch begins: what was wanted for the last one is void, and so are its critical sections."""
        self._where = _Where.OUTSIDE
        self._wanted = self.pass_open = False
        self._owners.clear()
        self._raised = None

    def enter_section(self, owner: FrameType | None = None) -> None:
        """A critical section begins: an interrupt waits until its end. Sections nest.

        `owner`: a frame; when that is left, the section is over, also where nobody says so.
        """
        self._drop_left(sys._getframe())
        if not self._owners:
            self._entered_at = time.monotonic()
        self._owners.append(owner)

    def leave_section(self) -> None:
        """Raises Interrupted at the end of the outermost section when one came meanwhile."""
        if not self._owners:  # the epoch was reset meanwhile
            return
        if len(self._owners) > 1:
            self._owners.pop()
            return
        self._longest_section = max(self._longest_section, time.monotonic() - self._entered_at)
        if self._watching_section:
            self._section_left.set()  # still inside: an interrupt in there would leave the event's lock taken
        self._owners.clear()
        if self._wanted and self._where is _Where.INSIDE and not self.pass_open:
            self._raise()

    def open_pass(self) -> None:
        """A pass of a training loop has begun to change things: an interrupt waits until `close_pass`, so that what
        has begun is finished, for as long as such a pass usually takes from here on."""
        if not self.pass_open:
            self._pass_opened_at = time.monotonic()
            usual = _SECTION_LIMIT_FACTOR * self._longest_pass
            self._pass_patience = min(max(_SHORTEST_SECTION_LIMIT_S, usual or _FIRST_SECTION_LIMIT_S), _PASS_LIMIT_S)
            self.pass_open = True

    def presume_pass(self) -> None:
        """What is left of the pass most likely changes nothing: it is given a moment only."""
        self._pass_patience = _SHORTEST_SECTION_LIMIT_S

    def close_pass(self) -> None:
        """The pass is over. Raises Interrupted when an interrupt came meanwhile."""
        if not self.pass_open:
            return
        self._longest_pass = max(self._longest_pass, time.monotonic() - self._pass_opened_at)
        if self._watching_section:
            self._section_left.set()  # still open: an interrupt in there would leave the event's lock taken
        self.pass_open = False
        if self._wanted and self._where is _Where.INSIDE and not self._owners:
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
            if not self._owners or self._where is _Where.OUTSIDE or self._all_left():
                return True
            usual = self._longest_section
            patience = max(_SHORTEST_SECTION_LIMIT_S, _SECTION_LIMIT_FACTOR * usual)
            return self._section_left.wait(min(limit, patience if usual else _FIRST_SECTION_LIMIT_S))
        finally:
            self._watching_section = False

    def wait_for_pass(self, limit: float) -> None:
        """Gives an open pass the time it usually takes, `limit` seconds at most; then it is open no more. To be called
        when the communicators are broken: who waits in a collective then leaves it with an error."""
        self._section_left.clear()
        self._watching_section = True
        try:
            if self.pass_open and self._where is not _Where.OUTSIDE:
                self._section_left.wait(min(limit, self._pass_patience))
        finally:
            self._watching_section = False
            self.pass_open = False

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

    def end_wait(self, waits: Callable[[FrameType | None], bool]) -> None:
        """The script is over, and the main thread, of which `waits` holds, is to wait no longer for what is left of it.
        Python goes on with the next thing that the end of a process consists of."""
        self._waits = waits
        if self._main_ident is not None:
            signal.pthread_kill(self._main_ident, INTERRUPT_SIGNAL)

    # ---- inside --------------------------------------------------------------------------------------------------

    def _signal_main(self) -> None:
        if self._where is not _Where.OUTSIDE and self._main_ident is not None:
            signal.pthread_kill(self._main_ident, INTERRUPT_SIGNAL)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._waits(frame):
            raise Interrupted("what an interrupted attempt has left is not waited for")
        if self._wanted and self._owners:
            self._drop_left(frame)
        free = not self._owners and not self.pass_open
        if self._wanted and free and (self._where is _Where.INSIDE or self._swallowed()):
            self._raise()

    def _drop_left(self, frame: FrameType | None) -> None:
        """Ends the sections whose frames have been left, by an exception that somebody has caught."""
        while self._owners and self._owners[-1] is not None and not is_on_stack(self._owners[-1], frame):
            self._owners.pop()

    def _all_left(self) -> bool:
        """The same question, asked by the other thread."""
        frame = sys._current_frames().get(self._main_ident or 0)
        return all(owner is not None and not is_on_stack(owner, frame) for owner in list(self._owners))

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
