"""Processes that die with their agent: starting them, watching them, and leaving none behind.

Every child is the leader of its own session. It dies with the agent by three means: PDEATHSIG for itself, the keeper
(`keeper.py`) for what it started, and the mark of the job in its environment for what left its session. The agent is
a subreaper, so that what a dead worker started comes to the agent and is found by its mark.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from ..protocol.names import JOB_TOKEN, WORKER_IDENTITY
from .directories import Owned
from .keeper import cleans_up

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37
_libc = ctypes.CDLL(None, use_errno=True)
_KILL_LIMIT_S = 5.0
"""A killed process that the kernel holds for longer (uninterruptible sleep) is not waited for."""
_KEEPER_LIMIT_S = 20.0
"""More than the keeper gives itself."""


_MOST_DESCRIPTORS = 1 << 16


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
        if signum == signal.SIGKILL and kill_sparing(self.pid):
            return
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
    limits = _limits_of_children

    def before_exec() -> None:
        if limits is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
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


_ROUNDS = 4


def kill_sparing(group: int) -> bool:
    """SIGKILL for a process group, except for who cleans up after the others (`keeper.cleans_up`) and then ends.

    False, and nothing is done, if nobody is to be spared: the whole group can be signalled at once.
    """
    members = group_members(group)
    if not any(map(cleans_up, members)):
        return False
    killed = set[int]()
    for _ in range(_ROUNDS):  # they can fork meanwhile; what escapes is found by its mark
        left = [pid for pid in group_members(group) if pid not in killed and not cleans_up(pid)]
        if not left:
            break
        for pid in left:
            killed.add(pid)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
    return True


def group_members(group: int) -> list[int]:
    """Who is in a process group that this process has started: its leader, orphans that came to us, and their like."""
    found: list[int] = []
    waiting = [group, *children()]
    while waiting:
        pid = waiting.pop()
        with contextlib.suppress(ProcessLookupError):
            if pid not in found and os.getpgid(pid) == group:
                found.append(pid)
                waiting += children(pid)
    return found


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

    def __init__(self, token: str, directories: Sequence[Owned]) -> None:
        read_end, self._write_end = os.pipe()
        try:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", str(Path(__file__).with_name("keeper.py"))),
                    *(str(read_end), *(str(directory.path) for directory in directories)),
                ],
                # The token is not a secret, but the job's own mark must not be in the keeper's environment.
                env={"KEEPER_TOKEN": f"{JOB_TOKEN}={token}"},
                stdin=subprocess.DEVNULL,
                # It holds the proof that the directories are somebody's for as long as it has to remove them.
                pass_fds=(read_end, *(directory.proof for directory in directories if directory.proof is not None)),
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


_limits_of_children: tuple[int, int] | None = None
"""How many descriptors they may have, if that is not what this process may: as if it had never asked for more."""


@contextlib.contextmanager
def many_descriptors() -> Iterator[None]:
    """Meanwhile this process may have as many as it is allowed to ask for; processes that it starts are not affected.

    An agent holds sockets for all its workers, and 1024, the usual limit, are soon used up.
    """
    global _limits_of_children
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        yield
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):  # it goes on with what it has
        yield
        return
    _limits_of_children = soft, hard
    try:
        yield
    finally:
        _limits_of_children = None
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def users_of_descendants() -> set[int]:
    """The users as whom the processes run that this one has started, and those that they have started."""
    found: set[int] = set()
    waiting, seen = children(), set[int]()
    while waiting:
        pid = waiting.pop()
        if pid in seen:
            continue
        seen.add(pid)
        with contextlib.suppress(OSError):
            found.add(os.stat(f"/proc/{pid}").st_uid)
        waiting += children(pid)
    return found


def children(of: int | str = "self") -> list[int]:
    """The pids of a process's children. This process's: those it started, and orphans of which it is the subreaper."""
    found: list[int] = []
    for file in Path(f"/proc/{of}/task").glob("*/children"):
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
