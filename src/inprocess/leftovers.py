"""Threads and child processes that an interrupted attempt has left, and the end of a process that waits for them.

An interrupt takes the main thread out of the function; a thread or a child that it had started is not taken out of
anything, and what would have ended it (`queue.put(None)`, `pool.shutdown()`) is behind the line that was interrupted.
That is harmless until the script is over: then Python joins every thread that is no daemon and multiprocessing every
child, for ever. Who is left from an interrupted attempt gets `LEFTOVER_TIMEOUT_S` there. Then it is said who is waited
for and where it is, children are killed, and the main thread is taken out of the join: the process ends with the exit
code that its script has earned. Threads of the last attempt are joined for as long as Python joins them.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from types import FrameType
from typing import Any

from .interrupt import InterruptGate, joined_in_a_handler, joins_at_the_end
from .log import log

LEFTOVER_TIMEOUT_S = 10.0
"""From the end of the script, or of the last thread that is no leftover, to the end of waiting for leftovers."""
_LOOK_EVERY_S = 0.5


class Leftovers:
    """One per process. Methods are for the main thread."""

    def __init__(self, gate: InterruptGate) -> None:
        self._gate = gate
        self._before: set[threading.Thread] = set()
        self._threads: set[threading.Thread] = set()
        self._children: dict[int, str] = {}
        self._before_children: set[int] = set()
        self._watch: threading.Thread | None = None

    def attempt_begins(self) -> None:
        """The function is about to be entered: what there is now is not of this attempt."""
        self._before = set(threading.enumerate())
        self._before_children = set(_children())

    def attempt_failed(self) -> None:
        """It has been left by a fault: what it has started and not ended is left over."""
        self._threads |= {t for t in threading.enumerate() if t not in self._before and _is_joined(t)}
        self._children |= {pid: name for pid, name in _children().items() if pid not in self._before_children}
        if (self._threads or self._children) and self._watch is None:
            self._watch = threading.Thread(target=self._wait_for_the_end, name="hyperpodrun-leftovers", daemon=True)
            self._watch.start()

    # ---- the watching thread ---------------------------------------------------------------------------------------

    def _wait_for_the_end(self) -> None:
        """Python calls nobody when a script is over and its threads are about to be joined; it shows on the stack."""
        main = threading.main_thread().ident or 0
        since = time.monotonic()
        said = False
        while True:
            threads, children, others = self._left()
            if others or not self._waits(sys._current_frames().get(main)):
                since = time.monotonic()
            elif (threads or children) and time.monotonic() - since >= LEFTOVER_TIMEOUT_S:
                if not said:
                    said = True
                    _tell(threads, children)
                for pid in children:
                    _kill(pid)
                if threads:
                    self._gate.end_wait(self._waits)
            time.sleep(_LOOK_EVERY_S)

    def _waits(self, frame: FrameType | None) -> bool:
        """Whether the main thread, with this frame, waits for the end of others as the last thing, by itself or in an
        atexit handler of an interrupted attempt (`atexit.register(thread.join)`)."""
        if joins_at_the_end(frame):
            return True
        joined = joined_in_a_handler(frame)
        return any(one in self._threads or getattr(one, "pid", None) in self._children for one in joined)

    def _left(self) -> tuple[list[threading.Thread], dict[int, str], bool]:
        """Leftover threads, leftover children, and whether there is anything else that Python waits for."""
        main = threading.main_thread()
        alive = [t for t in threading.enumerate() if t is not main and _is_joined(t)]
        children = {pid: name for pid, name in self._children.items() if _lives(pid)}
        # Those that are daemons are ended by multiprocessing itself, once the threads are gone.
        own = [child.pid for child in _all_children() if not child.daemon and child.pid not in self._children]
        others = any(t not in self._threads and not t.daemon for t in alive) or any(_lives(pid) for pid in own)
        return [t for t in alive if t in self._threads], children, others


def _is_joined(thread: threading.Thread) -> bool:
    """Whether the end of a process waits for it: also for what feeds a multiprocessing queue that nobody reads."""
    return not thread.daemon or thread.name == "QueueFeederThread"


def _tell(threads: list[threading.Thread], children: dict[int, str]) -> None:
    names = [f"thread {thread.name}" for thread in threads]
    names += [f"child {name} ({pid})" for pid, name in children.items()]
    log("leftovers", waited_for=", ".join(names), timeout_s=LEFTOVER_TIMEOUT_S, action="end without them")
    frames = sys._current_frames()
    for thread in threads:
        frame = frames.get(thread.ident or 0)
        if frame is not None:
            stack = "".join(traceback.format_stack(frame))
            sys.stderr.write(f"Thread {thread.name} of an interrupted attempt, most recent call last:\n{stack}")
    sys.stderr.flush()


def _children() -> dict[int, str]:
    """Children of multiprocessing, which joins them at the end, by pid: their names. Waits for none."""
    return {child.pid: child.name for child in _all_children() if child.pid is not None}


def _all_children() -> list[Any]:
    return list(getattr(sys.modules.get("multiprocessing.process"), "_children", ()))


def _lives(pid: int) -> bool:
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


def _kill(pid: int) -> None:
    if _lives(pid):  # and so it is still our child
        os.kill(pid, signal.SIGKILL)
