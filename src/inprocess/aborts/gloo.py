"""gloo's connections, broken at the right end and kept open for as long as it takes.

gloo does not implement `abort()`, but `shutdown(2)` on its connected sockets frees a blocked collective in about a
millisecond; on its listening socket it would terminate the process.

Gloo forgets a send that fails with EPIPE before it has seen the end of the stream, and a message that is cut in the
middle: whoever waits for one waits until the group's timeout (seen with many small all-reduces, in one of four
faults). So only the reading side is shut, after what is on its way has arrived, and the connection is kept open, by a
descriptor of our own, until every rank is out. A peer that dies closes it all the same: `GlooWait` tells.

A rank that waits for another one to connect has no socket to shut: `answer_calls` ends that.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import re
import socket
import stat
import sys
import termios
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from ...protocol.messages import MAX_LISTENERS
from .abort import Abort, AbortState

_LONGEST_ARRIVAL_S = 0.05
_LONGEST_CALL_S = 1.0
_LOOP, _RUNNER = "gloo_tcp_loop", "pt_gloo_runloo"
"""Names of gloo's threads: of its event loops, and of those in which torch runs the collectives."""
_TURNS = 25
"""Looks of an event loop, a quarter of a second if the machine has nothing else to do."""
_A_SIGNAL_NS = 2_000_000
"""More than it takes to be woken by a signal and to go to sleep again."""
_BETWEEN_SIGNALS_S = 0.02
"""Less than passes between two of them."""
_INODE = re.compile(r"^tfd:.* ino:([0-9a-f]+)", re.MULTILINE)
_FUTEX = {"x86_64": "202", "aarch64": "98"}.get(platform.machine(), "")

_held: dict[int, socket.socket] = {}
"""The connections of a failed epoch, until the next one starts, by the numbers of their inodes."""


class AbortGloo(Abort):
    """Ends the streams of the epoch's gloo groups: of connected sockets with one of the listeners at either end, and of
    those that the event loop of such a listener watches, where the listener at the other end is another node's."""

    def __call__(self, state: AbortState) -> None:
        if not state.gloo_listeners:
            return
        new = _of_gloo(state.gloo_listeners)
        for inode in new.keys() & _held.keys():
            new.pop(inode).close()
        _held.update(new)
        _let_arrive(new.values())
        for found in new.values():
            with contextlib.suppress(OSError):  # the peer is gone, and with it the connection
                found.shutdown(socket.SHUT_RD)

    def again(self, state: AbortState) -> None:
        """A group that was being set up has connections by now that did not exist at first."""
        self(state)


def release_connections() -> None:
    """Closes what `AbortGloo` has kept open, once every rank has left the epoch it belonged to."""
    while _held:
        _held.popitem()[1].close()


class GlooWait:
    """Tells when a thread is in a wait that only gloo could end and never will. Made when the sockets have been shut.

    Time does not tell: on a busy machine whoever is to be woken may not have run yet. But gloo's event loops look for
    news every 10 ms; when they have looked that often and the wait goes on, nothing is to come.

    A thread that runs collectives can wait for a lost message of which the main thread does not want to know any more:
    it counts only while that sleeps, too. Whoever computes, or waits for the interpreter's lock, is on its way.
    """

    def __init__(self) -> None:
        self._turns = _switches(_LOOP)
        self._waits = _switches(_RUNNER)
        self._main = _Moment()

    def is_endless(self) -> bool:
        """To be asked again and again, while the main thread does not follow its signals."""
        turns, waits, main = _switches(_LOOP), _switches(_RUNNER), _Moment()
        if waits != self._waits or main.has_moved_since(self._main):  # something has gone on
            self._turns, self._waits = turns, waits
        self._main = main
        turned = [count - self._turns.get(thread, count) for thread, count in turns.items()]
        return bool(turned) and min(turned) >= _TURNS and _waits_with_a_deadline(waits)


class _Moment:
    """What the main thread had done by now."""

    def __init__(self) -> None:
        self._at = time.monotonic()
        task = Path(f"/proc/self/task/{os.getpid()}")
        self._slept = int((task / "status").read_text().split("\nvoluntary_ctxt_switches:")[1].split()[0])
        self._ran_ns = 0
        with contextlib.suppress(OSError, ValueError):  # a kernel without statistics of its scheduler
            self._ran_ns = int((task / "schedstat").read_text().split()[0])

    def has_moved_since(self, before: _Moment) -> bool:
        """Signals that it does not follow wake it now and then; for the interpreter's lock it wakes every 5 ms."""
        naps = self._slept - before._slept
        return self._ran_ns - before._ran_ns > _A_SIGNAL_NS or naps > 1 + (self._at - before._at) / _BETWEEN_SIGNALS_S


def answer_calls(listeners: frozenset[tuple[str, int]], world_size: int) -> bool:
    """Ends this process's waits for ranks that were to connect to it and will not; False if it listens nowhere.

    Whoever has the lower address of two ranks waits until the other one connects and says in eight bytes which pair it
    means. There is no socket yet that could be shut. So each wait gets its connection, from here, and at once its end.
    """
    own: list[tuple[int, tuple[str, int]]] = []
    for found in _sockets():
        with found:
            if _listens(found, listeners):
                own.append((found.family, found.getsockname()))
    for family, address in own:
        for pair in range(world_size):
            with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as call:
                call.settimeout(_LONGEST_CALL_S)
                call.connect(address)
                call.sendall(pair.to_bytes(8, sys.byteorder))
    return bool(own)


def progress() -> dict[int, int]:
    """By thread of gloo's: a number that changes when a collective goes on, or when many bytes arrive for it."""
    return _switches(_RUNNER) | _ticks(_LOOP)


def waits_for_a_peer(*, main_thread: bool) -> bool:
    """Whether one of gloo's threads, or with `main_thread` that one, is in a wait that a peer should end."""
    runners = _switches(_RUNNER)
    return _in_futex_with_a_deadline((os.getpid(), *runners) if main_thread else runners)


def _waits_with_a_deadline(runners: Iterable[int]) -> bool:
    """Whether the main thread or one of these, which run collectives, is in a wait of gloo's."""
    return _in_futex_with_a_deadline((os.getpid(), *runners))


def _in_futex_with_a_deadline(threads: Iterable[int]) -> bool:
    """gloo's waits are; a thread that runs collectives and has none to run waits without one."""
    for thread in threads:
        with contextlib.suppress(OSError):
            number, *arguments = Path(f"/proc/self/task/{thread}/syscall").read_text().split()
            if number == _FUTEX and int(arguments[3], 16):
                return True
    return False


def _switches(name: str) -> dict[int, int]:
    """By thread of this name: how often it has gone to sleep."""
    found: dict[int, int] = {}
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/self/task/{thread}/status").read_text()
            if status.startswith(f"Name:\t{name}"):
                found[int(thread)] = int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])
    return found


def _ticks(name: str) -> dict[int, int]:
    """By thread of this name: hundredths of a second on a processor; next to none for an idle event loop."""
    found: dict[int, int] = {}
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):
            called, _, rest = Path(f"/proc/self/task/{thread}/stat").read_text().partition("(")[2].rpartition(")")
            if called == name:
                fields = rest.split()
                found[int(thread)] = int(fields[11]) + int(fields[12])
    return found


def _sockets() -> Iterator[socket.socket]:
    """A descriptor of our own for every TCP socket of this process. To be closed by the caller.

    Of our own because another thread may close and reuse the number at any moment.
    """
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            duplicate = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        if duplicate.family in (socket.AF_INET, socket.AF_INET6) and duplicate.type == socket.SOCK_STREAM:
            yield duplicate
        else:
            duplicate.close()


def _connects(found: socket.socket, listeners: frozenset[tuple[str, int]]) -> bool:
    """Whether it is connected with one of these at either end."""
    try:
        ends = (found.getpeername()[:2], found.getsockname()[:2])
    except OSError:  # not connected
        return False
    return any(end in listeners for end in ends)


def _of_gloo(listeners: frozenset[tuple[str, int]]) -> dict[int, socket.socket]:
    """Its connections, by their inodes. One walk: each call to the kernel gives the interpreter's lock away, and a main
    thread that computes keeps it for 5 ms."""
    found: dict[int, socket.socket] = {}
    others: dict[int, socket.socket] = {}
    own: set[int] = set()
    for one in _sockets():
        inode = os.fstat(one.fileno()).st_ino
        if inode in found or inode in others:
            one.close()
        elif _connects(one, listeners):
            found[inode] = one
        else:
            if _listens(one, listeners):
                own.add(inode)
            others[inode] = one
    if not _every_listener_is_known(listeners):
        for inode in _watched_with(own) & others.keys():
            if _is_connected(others[inode]):
                found[inode] = others.pop(inode)
    for one in others.values():
        one.close()
    return found


def _every_listener_is_known(listeners: frozenset[tuple[str, int]]) -> bool:
    """Where all ranks are on this node, and the list is not cut, each connection has one of these at an end."""
    all_are_here = os.environ.get("WORLD_SIZE", "") == os.environ.get("LOCAL_WORLD_SIZE")
    return all_are_here and len(listeners) < MAX_LISTENERS


def _is_connected(found: socket.socket) -> bool:
    try:
        return bool(found.getpeername())
    except OSError:
        return False


def _watched_with(own: set[int]) -> set[int]:
    """The inodes of all that is watched by an epoll instance which watches one of these, too, the listeners of this
    process: gloo has an event loop for each of its devices, and one listener."""
    watched: set[int] = set()
    for name in os.listdir("/proc/self/fd") if own else ():
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[eventpoll]":
                together = {int(ino, 16) for ino in _INODE.findall(Path(f"/proc/self/fdinfo/{name}").read_text())}
                watched |= together if together & own else set()
    return watched


def _listens(found: socket.socket, listeners: frozenset[tuple[str, int]]) -> bool:
    """Whether it is one of these."""
    return bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)) and found.getsockname()[:2] in listeners


def _let_arrive(sockets: Collection[socket.socket]) -> None:
    """Waits, for a moment at most, until nothing is on its way on these sockets; mostly that is so at once."""
    deadline = time.monotonic() + _LONGEST_ARRIVAL_S
    while any(_in_flight(found) for found in sockets) and time.monotonic() < deadline:
        time.sleep(0.0005)


def _in_flight(found: socket.socket) -> bool:
    """Bytes that were received and not read, or written and not acknowledged."""
    try:
        counts = [fcntl.ioctl(found, request, bytes(4)) for request in (termios.FIONREAD, termios.TIOCOUTQ)]
    except OSError:
        return False
    return any(int.from_bytes(count, sys.byteorder) for count in counts)
