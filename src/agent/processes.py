"""Processes that die with their agent: starting them, watching them, and leaving none behind.

Every child is the leader of its own session. It dies with the agent by three means: PDEATHSIG for itself, the keeper
(`keeper.py`) for what it started, and the mark of the job in its environment for what left its session. The agent is
a subreaper, so that what a dead worker started comes to the agent and is found by its mark.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from ..protocol.names import JOB_TOKEN, WORKER_IDENTITY

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37
_libc = ctypes.CDLL(None, use_errno=True)
_KILL_LIMIT_S = 5.0
"""A killed process that the kernel holds for longer (uninterruptible sleep) is not waited for."""
_KEEPER_LIMIT_S = 20.0
"""More than the keeper gives itself."""


class CannotStart(OSError):
    """A process, or what it needs, cannot be had: the launch cannot go on. The sentence says why."""


class Child:
    """One started process. `pidfd` becomes readable when it is gone; `reap` then tells how."""

    def __init__(self, pid: int, pidfd: int, process: subprocess.Popen[bytes] | None = None) -> None:
        self._process = process
        """None: forked from the standby source, and a child of this process all the same."""
        self.pid = pid
        self.pidfd = pidfd
        self.exit_code: int | None = None

    def signal_session(self, signum: int) -> None:
        """Signals the process and everything in its process group; no error when nobody is left."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signum)

    def kill(self) -> None:
        """SIGKILL for the process and its group; it is taken away unless the kernel holds it for too long."""
        self.signal_session(signal.SIGKILL)
        if self.gone_within(_KILL_LIMIT_S):
            self.reap()

    def gone_within(self, seconds: float) -> bool:
        """Waits for the process to be gone, at most so long."""
        gone = select.poll()
        gone.register(self.pidfd, select.POLLIN)
        return bool(gone.poll(seconds * 1000))

    def reap(self) -> int:
        """The exit code of a process that is gone (negative: the signal). Its pid is free afterwards."""
        if self._process is not None:
            self.exit_code = self._process.wait()
        else:
            self.exit_code = _wait(self.pidfd)
        os.close(self.pidfd)
        return self.exit_code


def start(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    stdin: int | None = None,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
    pass_fds: Sequence[int] = (),
) -> Child:
    """Starts `command` in its own session, to die with this process. Raises CannotStart.

    Call it on the thread that runs the agent: PDEATHSIG fires when the *thread* that forked ends.
    """
    agent = os.getpid()

    def before_exec() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != agent:  # the agent died between fork and prctl
            os._exit(1)

    try:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=before_exec,
            pass_fds=pass_fds,
        )
        return Child(process.pid, os.pidfd_open(process.pid), process)
    except OSError as error:
        raise CannotStart(f"{command[0]}: {error.strerror or error}") from error


def _wait(pidfd: int) -> int:
    try:
        ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    except ChildProcessError:  # taken away before it was known to be a worker
        return -signal.SIGKILL
    assert ended is not None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


@contextlib.contextmanager
def subreaper() -> Iterator[None]:
    """Meanwhile orphaned descendants become children of this process."""
    before = ctypes.c_int()
    _libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before))
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, before.value)


class Keeper:
    """Runs `keeper.py`: it kills what is left of the job, and its directories, once this process has ended."""

    def __init__(self, token: str, directories: Sequence[Path]) -> None:
        read_end, self._write_end = os.pipe()
        try:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", str(Path(__file__).with_name("keeper.py"))),
                    *(str(read_end), *map(str, directories)),
                ],
                # The token is not a secret, but the job's own mark must not be in the keeper's environment.
                env={"KEEPER_TOKEN": f"{JOB_TOKEN}={token}"},
                stdin=subprocess.DEVNULL,
                pass_fds=(read_end,),
                start_new_session=True,
            )
        finally:
            os.close(read_end)
        self.pid = self._process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    def dismiss(self) -> None:
        """The job is over in good order; the keeper makes its last round and ends."""
        os.close(self._write_end)
        with contextlib.suppress(subprocess.TimeoutExpired):  # it goes on without being waited for
            self._process.wait(_KEEPER_LIMIT_S)


def children() -> list[int]:
    """The pids of this process's children: those it started, and orphans that came to it as their subreaper."""
    found: list[int] = []
    for file in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError, ValueError):
            found += [int(pid) for pid in file.read_text().split()]
    return found


def who_catches(pid: int, signum: int) -> list[int]:
    """The process, if it has a handler for the signal; or else those that it has started and that have one.

    Such as the Python below a shell script, and not the helpers of a Python that has one itself.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        caught = int(status.partition("\nSigCgt:")[2].split(maxsplit=1)[0], 16)
        if caught >> (signum - 1) & 1:
            return [pid]
        below = " ".join(file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children"))
    except (OSError, ValueError, IndexError):  # it has ended
        return []
    return [found for child in below.split() for found in who_catches(int(child), signum)]


def in_own_session(pid: int) -> bool:
    """Whether a child is in the session of this process. Nothing of a job ever is: each of its processes left it."""
    try:
        return os.getsid(pid) == os.getsid(0)
    except ProcessLookupError:  # taken away meanwhile
        return True


def is_of_job(pid: int, token: str) -> bool:
    """Whether a process carries the mark of the job in its environment."""
    try:
        return f"{JOB_TOKEN}={token}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def worker_mark(pid: int) -> str | None:
    """Which worker started this process (`<local rank>.<incarnation>`), or None if none of ours did."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return None
    for entry in environment.split(b"\0"):
        name, _, value = entry.partition(b"=")
        if name == WORKER_IDENTITY.encode():
            return value.decode("ascii", "replace")
    return None
