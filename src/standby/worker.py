"""What a forked process does to be a worker: what a new process would have got from its parent and from exec.

`about_to_fork` is the source's; `begin` runs in the worker.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

from ..protocol import standby as protocol
from ..protocol.temporary import keep_sockets_with_the_job

_PR_SET_PDEATHSIG = 1
_ADOPTED = signal.SIGURG
"""Tells a worker that its first parent has ended. Ignored by default, so no harm if it comes unexpectedly."""
_ADOPTION_S = 10.0
_libc = ctypes.CDLL(None, use_errno=True)
_LINE = 3


@contextlib.contextmanager
def about_to_fork() -> Iterator[None]:
    """What must hold in the worker from its first instruction on, until it is ready."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [_ADOPTED])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def begin(agent: int, environment_fd: int, line_fd: int, stdout: int, stderr: int) -> None:
    """Becomes the agent's child and a worker; returns when the agent has said so. Ends the process otherwise."""
    os.setsid()
    _become_child_of(agent)
    line = socket.socket(fileno=line_fd)
    pidfd = os.pidfd_open(os.getpid())
    try:
        socket.send_fds(line, [protocol.encode(protocol.Forked(os.getpid()))], [pidfd])
        with open(environment_fd, "rb") as file:
            environment = file.read(protocol.MAX_ENVIRONMENT_BYTES)
        set_environment(protocol.unpack_environment(environment))
        _show_environment(environment)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        os.dup2(line.detach(), _LINE)
        os.closerange(_LINE + 1, _highest_fd() + 1)
        line = socket.socket(fileno=_LINE)
        _reopen_streams()
        _renew_randomness()
        _renew_identity()
        wanted = line.recv(1)
    except OSError:  # the agent is gone
        wanted = b""
    if not wanted:
        os._exit(1)
    line.close()


def set_environment(pairs: list[tuple[bytes, bytes]]) -> None:
    """Replaces the environment: Python's, and the one that C libraries read."""
    import posix

    os.environ.clear()
    _libc.clearenv()
    for name, value in pairs:
        os.environb[name] = value
    posix.environ.clear()
    posix.environ.update(pairs)


def _become_child_of(agent: int) -> None:
    """Waits for the first parent to end, and dies with the new one from then on."""
    _libc.prctl(_PR_SET_PDEATHSIG, _ADOPTED)
    if os.getppid() != agent:
        signal.sigtimedwait([_ADOPTED], _ADOPTION_S)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != agent:
        os._exit(1)
    while signal.sigtimedwait([_ADOPTED], 0) is not None:
        pass


def _environ_area() -> tuple[int, int]:
    """Where the kernel takes /proc/<pid>/environ from."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    return int(fields[47]), int(fields[48])


def _show_environment(environment: bytes) -> None:
    """Makes /proc/<pid>/environ the worker's: what finds a job's processes by their mark looks there."""
    begin, end = _environ_area()
    room = end - begin
    if len(environment) > room:
        os._exit(1)  # the agent has seen to it that this does not happen
    ctypes.memmove(begin, environment.ljust(room, b"\0"), room)


def _reopen_streams() -> None:
    """The same objects, on the descriptors as they are now. As CPython's create_stdio makes them."""
    for fd, stream in ((0, sys.stdin), (1, sys.stdout), (2, sys.stderr)):
        if not isinstance(stream, io.TextIOWrapper):
            continue  # closed, as it was for the agent
        writes = fd != 0
        unbuffered = stream.write_through
        binary: Any = open(fd, "wb" if writes else "rb", 0 if writes and unbuffered else -1, closefd=False)  # noqa: SIM115
        raw = getattr(binary, "raw", binary)
        raw.name = f"<{('stdin', 'stdout', 'stderr')[fd]}>"
        stream.__init__(  # type: ignore[misc]
            binary,
            encoding=stream.encoding,
            errors=stream.errors,
            newline="\n",
            line_buffering=not unbuffered and (raw.isatty() or fd == 2),
            write_through=unbuffered,
        )


def _renew_randomness() -> None:
    """Seeds as those of a new process: from the system, different in each. `random` sees to itself."""
    torch = sys.modules["torch"]
    torch.default_generator.seed()
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        numpy.seed()


def _renew_identity() -> None:
    """What the standard library made once for the source and a new process would have made for itself."""
    process = sys.modules.get("multiprocessing.process")
    if process is not None:
        process.current_process().authkey = os.urandom(32)
        keep_sockets_with_the_job()
    logging: Any = sys.modules.get("logging")
    if logging is not None:
        logging._startTime = time.time_ns() if isinstance(logging._startTime, int) else time.time()
    threading = sys.modules.get("threading")
    if threading is not None:
        threading.main_thread()._set_native_id()


def _highest_fd() -> int:
    return max(int(fd) for fd in os.listdir("/proc/self/fd"))
