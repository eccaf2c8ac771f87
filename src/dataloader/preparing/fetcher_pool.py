"""The fetcher processes of a producer, seen from the producer: forked, asked, heard, replaced when they die.

Nothing is decided here about batches: answers and deaths go to the producer's callbacks.
"""

from __future__ import annotations

import os
import selectors
import socket
import sys
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ...protocol import dataloader as protocol
from ...protocol.dataloader import Position
from .. import wire
from .fetcher import Restart
from .forked import describe_exit, die_with_parent

_IN_FLIGHT = 2
"""Batches asked of one fetcher at a time: it has the next in hand when it is done with one."""
_RESTART = 75
"""The exit code of a fetcher that wants to be replaced."""


@dataclass(eq=False)
class _Process:
    """One fetcher process, and what it was asked for, oldest first. `number`: which of the loader's workers it is."""

    number: int
    pid: int
    pidfd: int
    line: socket.socket
    jobs: deque[Position] = field(default_factory=deque)


class FetcherPool:
    """As many fetchers as `start` was told, whatever becomes of each.

    `serve(line, number)` is the life of one, in the forked process. `on_answer(message)`: what one has to say.
    `on_death(pid, jobs, how)`: one has died, asked for `jobs`; `how` is None where it only wanted to be replaced.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        serve: Callable[[socket.socket, int], None],
        on_answer: Callable[[protocol.FromFetcher], None],
        on_death: Callable[[int, deque[Position], str | None], None],
    ) -> None:
        self._selector = selector
        self._serve = serve
        self._on_answer = on_answer
        self._on_death = on_death
        self._running: list[_Process] = []

    def start(self, count: int) -> None:
        for number in range(count):
            self._running.append(self._fork(number))

    @property
    def have_room(self) -> bool:
        """Whether one would begin at once, or next, with what it is asked."""
        return any(len(fetcher.jobs) < _IN_FLIGHT for fetcher in self._running)

    def ask(self, position: Position, indices: bytes | None, state_fd: int | None) -> None:
        """Has a batch made by whoever has the least to do. `state_fd` stays the caller's."""
        fetcher = min(self._running, key=lambda fetcher: len(fetcher.jobs))
        fds: list[int] = []
        attached = ""
        if indices is not None and len(indices) > protocol.MAX_PACKET_BYTES // 2:
            fds, attached, indices = [wire.anonymous_file("indices", indices)], "indices", None
        elif state_fd is not None:
            fds, attached = [os.dup(state_fd)], "state"
        fetcher.jobs.append(position)
        try:
            packet = protocol.encode(protocol.Fetch(*position, indices, attached))
            if fds:
                socket.send_fds(fetcher.line, [packet], fds)
            else:
                fetcher.line.send(packet)
        except OSError:
            pass  # it is dead: its pidfd tells, and its jobs are asked again
        finally:
            wire.close_all(fds)

    # ---- processes ---------------------------------------------------------------------------------------------

    def _fork(self, number: int) -> _Process:
        ours, theirs = wire.pair()
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            ours.close()
            self._become(parent, number, theirs)
        theirs.close()
        ours.setblocking(False)
        fetcher = _Process(number, pid, os.pidfd_open(pid), ours)
        self._selector.register(ours, selectors.EVENT_READ, lambda events: self._hear(fetcher))
        self._selector.register(fetcher.pidfd, selectors.EVENT_READ, lambda events: self._on_exit(fetcher))
        return fetcher

    def _become(self, parent: int, number: int, line: socket.socket) -> None:
        """In the forked process; does not return."""
        code = 1
        try:
            die_with_parent(parent, "hpr-fetcher")
            # Whoever holds a copy of a line keeps its other end from seeing that this producer is gone.
            for other in self._running:
                other.line.close()
                os.close(other.pidfd)
            self._serve(line, number)
            code = 0
        except Restart:
            code = _RESTART
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _hear(self, fetcher: _Process) -> None:
        while fetcher in self._running:  # else an event of one that was just replaced
            try:
                data, _ = wire.receive(fetcher.line)
            except BlockingIOError:
                return
            if not data:
                return
            message = protocol.decode_from_fetcher(data)
            if not isinstance(message, protocol.Skipped):
                fetcher.jobs.remove((message.epoch, message.index))
            self._on_answer(message)

    def _on_exit(self, fetcher: _Process) -> None:
        self._hear(fetcher)  # its last words
        self._running.remove(fetcher)
        self._selector.unregister(fetcher.line)
        self._selector.unregister(fetcher.pidfd)
        _, status = os.waitpid(fetcher.pid, 0)
        fetcher.line.close()
        os.close(fetcher.pidfd)
        replaced = os.waitstatus_to_exitcode(status) == _RESTART
        self._on_death(fetcher.pid, fetcher.jobs, None if replaced else describe_exit(status))
        self._running.append(self._fork(fetcher.number))
