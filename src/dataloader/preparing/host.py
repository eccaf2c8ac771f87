"""The host of producers: one process per node and job. It has imported torch, and forks a producer for every stream.

Started by the agent (`agent/workers/data_host.py`), or, without hyperpodrun, by the first process that wants a stream
(`standalone.py`). Either way it is given a listening socket; a reader's first packet says which stream it wants, and
its connection is handed on to that stream's producer. So there is one place that starts producers, and never a second
producer for a stream. It never runs the user's code, has no threads and touches no GPU: a fork of it is safe.

A producer that has died is forked again when its readers come back, which they do at once: they see the end of their
connection. The host dies with the agent; without one, when the last process that used it is gone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import selectors
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import torch  # noqa: F401  # so that producers, which are forked, have it

from ...protocol import dataloader as protocol
from ...protocol.messages import MessageError
from .. import wire
from ..errors import DataLoaderError
from ..names import check_stream_name
from ..storing.directories import JobDirectory, remove_dead_jobs
from ..storing.encryption import KEY_BYTES
from . import opening
from .forked import describe_exit, log, log_seldom

_HELLO_S = 10.0
"""A connection that has not said what it wants by then is closed."""
_FIRST_USER_S = 60.0
_MAX_WAITING = 4096
_PAUSE_S = 0.1


@dataclass
class _Producer:
    """A running producer."""

    pid: int
    pidfd: int
    control: socket.socket


class Host:
    """Serves until killed; with `users_only`, until nobody is left who could want something."""

    def __init__(
        self, listener: socket.socket, token: str, runtime: Path, watched: list[int], users_only: bool
    ) -> None:
        self._listener = listener
        self._token = token
        self._runtime = runtime
        self._users_only = users_only
        self._users: dict[int, int] = {}
        """pidfd of every process that must be gone before this one ends, by pid."""
        self._waiting: dict[socket.socket, float] = {}
        """Connections that have not said what they want, and until when they may."""
        self._producers: dict[tuple[str, str], _Producer] = {}
        self._jobs: dict[str, JobDirectory] = {}
        self._keys: dict[tuple[str, str], bytes] = {}
        self._first_user_by = time.monotonic() + _FIRST_USER_S
        self._selector = selectors.DefaultSelector()
        for pid in watched:
            self._watch_user(pid)

    def run(self) -> None:
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, self._on_connection)
        while not self._over():
            for key, _ in self._selector.select(self._next_deadline()):
                key.data()
            self._close_silent()

    def clean_up(self) -> None:
        """Ends the producers and removes the caches: the job is over."""
        for running in self._producers.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(running.pid, signal.SIGKILL)
        for running in self._producers.values():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(running.pid, 0)
        for job in self._jobs.values():
            job.remove()

    # ---- who is there ------------------------------------------------------------------------------------------

    def _over(self) -> bool:
        return self._users_only and not self._users and time.monotonic() > self._first_user_by

    def _next_deadline(self) -> float | None:
        deadlines = list(self._waiting.values())
        if self._users_only and not self._users:
            deadlines.append(self._first_user_by)
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _watch_user(self, pid: int) -> None:
        if pid in self._users:
            return
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        self._users[pid] = pidfd
        self._selector.register(pidfd, selectors.EVENT_READ, lambda: self._on_user_exit(pid))

    def _on_user_exit(self, pid: int) -> None:
        pidfd = self._users.pop(pid)
        self._selector.unregister(pidfd)
        os.close(pidfd)
        if not self._users:
            self._first_user_by = time.monotonic()

    def _on_connection(self) -> None:
        while True:
            try:
                line, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ECONNABORTED:
                    continue
                log_seldom("data-host-full", reason=error.strerror)
                if not self._waiting:
                    time.sleep(_PAUSE_S)
                    return
                silent = next(iter(self._waiting))  # for the longest time
                self._forget(silent)
                silent.close()
                continue
            pid, uid = wire.peer(line)
            if uid != os.getuid() or len(self._waiting) >= _MAX_WAITING:
                log_seldom(
                    "data-refused", pid=pid, user=uid, reason="another user" if uid != os.getuid() else "too many"
                )
                line.close()
                continue
            if self._users_only:
                self._watch_user(pid)
            line.setblocking(False)
            self._waiting[line] = time.monotonic() + _HELLO_S
            self._selector.register(line, selectors.EVENT_READ, lambda line=line: self._on_hello(line))

    def _close_silent(self) -> None:
        now = time.monotonic()
        for line in [line for line, until in self._waiting.items() if until < now]:
            log_seldom("data-refused", pid=wire.peer(line)[0], reason=f"said nothing for {_HELLO_S:.0f} s")
            self._forget(line)
            line.close()

    def _forget(self, line: socket.socket) -> None:
        del self._waiting[line]
        self._selector.unregister(line)

    # ---- what they want ----------------------------------------------------------------------------------------

    def _on_hello(self, line: socket.socket) -> None:
        try:
            data, fds = wire.receive(line, 1)
        except BlockingIOError:
            return
        self._forget(line)
        try:
            if data:
                self._serve(line, data, fds)
        except (MessageError, ValueError) as error:
            log_seldom("bad-message", peer=f"pid {wire.peer(line)[0]}", reason=error)
        except (DataLoaderError, OSError) as error:
            with contextlib.suppress(OSError):
                line.send(protocol.encode(protocol.Refused("start", type(error).__name__, str(error)[:4000])))
        finally:
            wire.close_all(fds)
            line.close()

    def _serve(self, line: socket.socket, data: bytes, fds: list[int]) -> None:
        opened = protocol.decode_from_reader(data)
        if not isinstance(opened, protocol.Open) or len(fds) != 1:
            raise MessageError("the first packet is not Open with a recipe")
        if opened.version != protocol.VERSION:
            raise MessageError(f"version {opened.version} instead of {protocol.VERSION}")
        check_stream_name(opened.stream)
        key = (os.path.realpath(opened.options.cache_dir), opened.stream)
        running = self._producers.get(key)
        if running is not None:
            try:
                socket.send_fds(running.control, [data], [line.fileno(), fds[0]])
                return
            except OSError:  # it has just died
                self._on_producer_exit(key, running)
        self._fork(key, opened, line, fds[0])

    def _job(self, cache_dir: str) -> Path:
        """This job's directory below a cache directory; those of dead jobs beside it are removed."""
        if cache_dir not in self._jobs:
            job = JobDirectory(Path(cache_dir), self._token)
            with (self._runtime / "caches").open("a") as file:  # whoever cleans up after this process reads it
                file.write(f"{job.path}\n")
            removed = remove_dead_jobs(Path(cache_dir))
            if removed:
                log("data-removed", cache_dir=cache_dir, jobs=",".join(removed), reason="dead")
            self._jobs[cache_dir] = job
        return self._jobs[cache_dir].path

    def _fork(self, key: tuple[str, str], opened: protocol.Open, line: socket.socket, recipe_fd: int) -> None:
        job = self._job(key[0])
        secret = b""
        if opened.options.encrypt:
            secret = self._keys.setdefault(key, secrets.token_bytes(KEY_BYTES))
        ours, theirs = wire.pair()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            fds = [theirs.detach(), line.detach(), recipe_fd]
            for fd in [int(name) for name in os.listdir("/proc/self/fd")]:
                if fd > 2 and fd not in fds:
                    with contextlib.suppress(OSError):  # what listed them
                        os.close(fd)
            opening.main(parent, socket.socket(fileno=fds[0]), opened, fds[1:], job, secret)
        theirs.close()
        ours.setblocking(False)
        running = _Producer(pid, os.pidfd_open(pid), ours)
        self._producers[key] = running
        self._selector.register(running.pidfd, selectors.EVENT_READ, lambda: self._on_producer_exit(key, running))

    def _on_producer_exit(self, key: tuple[str, str], running: _Producer) -> None:
        if self._producers.get(key) is not running:
            return
        del self._producers[key]
        with contextlib.suppress(ProcessLookupError):
            os.kill(running.pid, signal.SIGKILL)
        _, status = os.waitpid(running.pid, 0)
        self._selector.unregister(running.pidfd)
        os.close(running.pidfd)
        running.control.close()
        if status != 0:
            how, action = describe_exit(status), "replaced when a reader wants it"
            log("data-producer-lost", stream=key[1], pid=running.pid, how=how, action=action)
