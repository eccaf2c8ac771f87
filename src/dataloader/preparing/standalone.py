"""Without hyperpodrun: the first process of a job on this node that wants a stream starts the host.

Processes belong together when they have one launcher: under torchrun its process, under Slurm the job step, else the
rendezvous address; a process that is alone has a host of its own. A lock sees to it that one of them starts the host.
It ends when the last of them (and torchrun, which may start them again) is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from ...protocol.names import AGENT_ENDPOINT, WORKER_IDENTITY
from .. import wire
from ..errors import ProducerError
from ..storing.directories import private_directory

_LOCK_S = 60.0
_SOCKET = "data.sock"


def family(environ: Mapping[str, str] = os.environ) -> tuple[str, list[int]]:
    """(what processes of one job on this node have in common, processes that keep its host alive)."""
    if "TORCHELASTIC_RUN_ID" in environ:
        parent = os.getppid()
        return f"torchrun {_identity(parent)}", [parent]
    for names in (("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID"), ("MASTER_ADDR", "MASTER_PORT", "RANK")):
        if all(environ.get(name) for name in names):
            return " ".join(f"{name}={environ[name]}" for name in names[:2]), []
    return f"process {_identity(os.getpid())}", []


def connect(timeout: float) -> socket.socket:
    """A connection to the host of this process's job; starts it if it is not there. Raises ProducerError."""
    key, watched = family()
    token = hashlib.sha256(f"{os.getuid()} {key}".encode()).hexdigest()[:16]
    parent = tempfile.gettempdir()
    runtime = Path(parent if len(os.fsencode(parent)) < 60 else "/tmp") / f"hyperpodrun-data-{os.getuid()}-{token}"
    path = str(runtime / _SOCKET)
    with contextlib.suppress(OSError):
        return wire.connect(path, timeout)
    with _locked(runtime):
        try:
            return wire.connect(path, timeout)
        except OSError:
            _start(runtime, token, watched)
        return wire.connect(path, timeout)


def withdraw(runtime: Path) -> None:
    """The host ends: whoever comes now starts another."""
    with contextlib.suppress(ProducerError, OSError), _locked(runtime):
        shutil.rmtree(runtime, ignore_errors=True)


def _start(runtime: Path, token: str, watched: list[int]) -> None:
    path = runtime / _SOCKET
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen(128)
        command = [sys.executable, "-m", "hyperpodrun.dataloader.preparing", f"--listener={listener.fileno()}"]
        command += [f"--token={token}", f"--runtime={runtime}"]
        command += ["--detach", "--users-only", f"--watch={os.getpid()}"]
        command += [f"--watch={pid}" for pid in watched]
        environment = {
            name: value for name, value in os.environ.items() if name not in (AGENT_ENDPOINT, WORKER_IDENTITY)
        }
        started = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=(listener.fileno(),),
            start_new_session=True,
            check=False,
        )
    if started.returncode != 0:
        raise ProducerError(f"the host of producers could not be started: {command[0]} ended with {started.returncode}")


@contextlib.contextmanager
def _locked(runtime: Path) -> Iterator[None]:
    deadline = time.monotonic() + _LOCK_S
    while True:
        private_directory(runtime)
        try:
            lock = os.open(runtime / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:  # an ending host has removed the directory
            continue
        try:
            _flock(lock, deadline, runtime)
            if _same_file(lock, runtime / "lock"):
                yield
                return
        finally:
            os.close(lock)


def _flock(lock: int, deadline: float, runtime: Path) -> None:
    """The lock is held for milliseconds, while a host is started: this wait is in no fault's path."""
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ProducerError(f"{runtime}/lock was held by another process for {_LOCK_S:.0f} s") from None
            time.sleep(0.005)
        else:
            return


def _same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _identity(pid: int) -> str:
    """A process, told from others that have had its pid: since when it runs, since the machine did."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return f"{pid} {fields[19]} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
