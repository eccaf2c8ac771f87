"""torchelastic's file timers: a worker says until when it will be done, and is killed when it is not.

Owns: the named pipe (`TORCHELASTIC_TIMER_FILE`) into which `torch.distributed.elastic.timer.FileTimerClient` writes a
line of JSON for each timer that it sets or clears, and the thread that reads it and keeps the deadlines. What follows
from a worker's death is decided where it always is. Only processes of this job are killed, whatever a line says.
Called by: `local.py`, if `TORCHELASTIC_ENABLE_FILE_TIMER` is 1.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import stat
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from .. import processes
from ..output.console import Console

ENABLED, FILE = "TORCHELASTIC_ENABLE_FILE_TIMER", "TORCHELASTIC_TIMER_FILE"
_CHUNK = 1 << 16
_LONGEST_LINE = select.PIPE_BUF
"""A client writes no more at once, so that lines do not mix."""
_MOST_TIMERS = 4096
_COMPLAIN_EVERY_S = 60.0
_LONGEST_SLEEP_S = 3600.0
"""More than that poll() need not be able to wait."""
_END_S = 5.0


class Request(msgspec.Struct):
    """A timer that is set, or cleared where the time is negative. `expiration_time`: seconds since 1970."""

    pid: Annotated[int, msgspec.Meta(gt=0, lt=1 << 31)]
    scope_id: str
    expiration_time: float
    signal: Annotated[int, msgspec.Meta(ge=-(1 << 31), lt=1 << 31)]
    version: int = 1


class _Process:
    """A process with timers. Its pidfd names it alone, also when its number is given to another."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.timers: dict[str, tuple[float, int]] = {}
        """By scope: when it expires (monotonic), and the signal."""


def pipe_for(directory: Path, environment: Mapping[str, str]) -> Path | None:
    """The named pipe, made where the environment wants timers. Raises OSError."""
    if environment.get(ENABLED) != "1":
        return None
    path = Path(environment.get(FILE) or directory / "timers")
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISFIFO(path.lstat().st_mode):
            raise FileExistsError(f"{FILE}={path} exists and is no named pipe")
        path.unlink()  # of an earlier launch
    os.mkfifo(path, mode=0o600)
    return path


class FileTimers:
    """Watches the timers of this node's workers, on a thread of its own, until it is closed."""

    def __init__(self, path: Path, token: str, console: Console, rank_of: Callable[[int], int | None]) -> None:
        self._path = path
        self._token = token
        self._console = console
        self._rank_of = rank_of
        self._processes: dict[int, _Process] = {}
        self._rest = b""
        self._silent_until = 0.0
        # It is open for writing here too: it never ends, however many clients come and go.
        self._pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        self._wake_read, self._wake_write = os.pipe()
        self._poll = select.poll()
        for fd in (self._pipe, self._wake_read):
            self._poll.register(fd, select.POLLIN)
        self._thread = threading.Thread(target=self._run, name="hyperpodrun-timers", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """No worker runs any more."""
        os.close(self._wake_write)
        self._thread.join(_END_S)
        if self._thread.is_alive():  # it reads of a process that the kernel does not let it look at
            return
        for fd in (self._pipe, self._wake_read, *(process.pidfd for process in self._processes.values())):
            os.close(fd)
        self._path.unlink(missing_ok=True)

    def alive(self) -> bool:
        """Whether somebody watches."""
        return self._thread.is_alive()

    # ---- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            for fd, _ in self._poll.poll(self._until_next_ms()):
                if fd == self._wake_read:
                    return
                if fd == self._pipe:
                    self._read()
                else:
                    self._forget(fd)
            self._expire(time.monotonic())

    def _until_next_ms(self) -> float | None:
        dues = [due for process in self._processes.values() for due, _ in process.timers.values()]
        if not dues:
            return None
        return min(_LONGEST_SLEEP_S, max(0.0, min(dues) - time.monotonic())) * 1000 + 1

    def _read(self) -> None:
        try:
            data = os.read(self._pipe, _CHUNK)
        except BlockingIOError:
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LONGEST_LINE:
            self._rest = b""
            self._complain(f"a line of more than {_LONGEST_LINE} bytes")
        for line in lines:
            try:
                self._take(msgspec.json.decode(line, type=Request))
            except (msgspec.MsgspecError, ValueError, OSError) as error:
                self._complain(error)

    def _take(self, request: Request) -> None:
        """Raises ValueError and OSError for what is not taken."""
        process = next((known for known in self._processes.values() if known.pid == request.pid), None)
        if request.expiration_time < 0:
            if process is not None:
                process.timers.pop(request.scope_id, None)
            return
        if process is None:
            process = self._new(request.pid)
        timers = sum(len(known.timers) for known in self._processes.values())
        if timers >= _MOST_TIMERS and request.scope_id not in process.timers:
            raise ValueError(f"more than {_MOST_TIMERS} timers at once")
        due = time.monotonic() + max(0.0, request.expiration_time - time.time())
        process.timers[request.scope_id] = (due, request.signal)

    def _new(self, pid: int) -> _Process:
        process = _Process(pid)
        if not processes.is_of_job(pid, self._token):
            os.close(process.pidfd)
            raise ValueError(f"process {pid} is not of this job")
        self._processes[process.pidfd] = process
        self._poll.register(process.pidfd, select.POLLIN)
        return process

    def _forget(self, pidfd: int) -> None:
        """The process is gone."""
        self._poll.unregister(pidfd)
        os.close(pidfd)
        del self._processes[pidfd]

    def _expire(self, now: float) -> None:
        for process in self._processes.values():
            late = sorted((due, scope) for scope, (due, _) in process.timers.items() if due <= now)
            if not late:
                continue
            wanted = [process.timers[scope][1] for _, scope in late]
            signum = next((number for number in wanted if number > 0), 0)  # a timer may only be there to be told of
            process.timers.clear()
            self._console.log(
                "timer-expired",
                rank=self._rank_of(process.pid),
                pid=process.pid,
                scope=",".join(scope for _, scope in late),
                signal=_name(signum),
            )
            if signum > 0:
                try:
                    signal.pidfd_send_signal(process.pidfd, signum)
                except (OSError, ValueError) as error:
                    self._complain(error)

    def _complain(self, reason: object) -> None:
        """One line a minute."""
        if time.monotonic() >= self._silent_until:
            self._silent_until = time.monotonic() + _COMPLAIN_EVERY_S
            self._console.log("timer-refused", reason=reason)


def _name(signum: int) -> str:
    try:
        return signal.Signals(signum).name if signum > 0 else "none"
    except ValueError:
        return str(signum)
