"""The agent's side of standbys: one source process, and the workers that are forked from it.

Decides per worker between a fork and a cold start, watches the source, replaces it when it dies, and starts cold what
a source cannot give. Knows nothing of ranks and epochs. Never blocks: what is asked for comes back as a call.

Each request has a line, a socket pair of its own. The worker says on it that it is there, as a child of the agent, and
waits for a byte; whatever goes wrong on the way is the end of the line, and the worker is started cold. A worker whose
line was closed at this end goes away by itself. So nothing has to be undone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from .. import processes
from ..config import LaunchConfig
from ..environment import worker_command
from ..output.console import Console
from .imports import Imports, PythonCommand, examine, torch_is_installed
from .settings import OF_THE_JOB, READ_LATER

if TYPE_CHECKING:
    import asyncio

    from ...protocol import standby as protocol

SWITCH = "HYPERPODRUN_STANDBY"
_READ_AT_IMPORT = (
    "ATEN_", "CUDA_", "GLOO_", "GOMP_", "HIP_", "KMP_", "LANG", "LC_", "LD_", "MALLOC_", "MKL_", "NCCL_", "NVIDIA_",
    "OMP_", "OPENBLAS_", "PYTHON", "PYTORCH_", "ROCR_", "TORCHDYNAMO_", "TORCHINDUCTOR_", "TORCH_",
)  # fmt: skip
"""Beginnings of the names that libraries read when they are imported."""
_OF_ONE_WORKER = (
    "HYPERPODRUN_AGENT",
    "HYPERPODRUN_WORKER",
    "TORCHELASTIC_ERROR_FILE",
    "RANK",
    "LOCAL_RANK",
    "ROLE_RANK",
)
"""Names that the source must not have: modules may look at them when they are imported."""
_ROOM_BYTES = 32 << 10
_WARM_LIMIT_S = 60.0
"""A worker waits no longer than this for a source that still imports."""
_FORK_LIMIT_S = 5.0
"""And no longer than this for one that is warm: it is stuck, and replaced."""
_DEATHS = 3
"""So many sources in a row that die before they are warm, and there is no other."""
_LATE_START_S = 5.0

Started = Callable[[processes.Child], None]


@dataclass
class Launch:
    """A worker to be started."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    stdout: BinaryIO | int | None
    stderr: BinaryIO | int | None
    started: Started
    """Called with the process; at once when it is started cold."""

    def cold(self) -> None:
        self.started(processes.start(self.command, self.environment, stdout=self.stdout, stderr=self.stderr))


class _Source:
    """The running source process."""

    def __init__(self, child: processes.Child, control: socket.socket) -> None:
        self.child = child
        self.control = control
        self.ready = False
        self.spoiled = False
        """By torch.compile's backend: the next one goes without."""


class Standbys:
    """Starts the workers of one launch."""

    def __init__(self, config: LaunchConfig, console: Console) -> None:
        self._commands = {worker_command(config, rank) for rank in range(config.nproc_per_node)}
        self._preload = config.preload
        self._inprocess = config.inprocess_restart
        self._console = console
        self._wanted = self._what_for(config)
        self._environment: dict[str, str] = {}
        """What the source was started with, less what only it has."""
        self._room = 0
        self._source: _Source | None = None
        self._deaths = 0
        self._pending: dict[socket.socket, Launch] = {}
        self._limits: dict[socket.socket, asyncio.TimerHandle] = {}
        """Of who is pending."""
        self._loop: asyncio.AbstractEventLoop | None = None

    def _what_for(self, config: LaunchConfig) -> Imports:
        """What the script imports; NOTHING: there will be no source."""
        if config.start_method == "spawn" or os.environ.get(SWITCH) == "0":
            return Imports.NOTHING
        if len(self._commands) > 1:
            self._console.debug("cold-start", reason="each rank has a command of its own")
            return Imports.NOTHING
        (words,) = self._commands
        command = PythonCommand.parse(words)
        if command is None:
            if not config.no_python:
                self._off("workers run another interpreter")
            return Imports.NOTHING
        found, change = examine(command, OF_THE_JOB if config.preload else READ_LATER)
        if change is not None and found is not Imports.NOTHING and torch_is_installed():
            self._off(f"{change}, which libraries may read when they are imported")
            return Imports.NOTHING
        if config.preload and found is not Imports.COMPILER:
            found = Imports.ALL
        return found if found is not Imports.NOTHING and torch_is_installed() else Imports.NOTHING

    # ---- for the agent -------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        """Of the source."""
        return None if self._source is None else self._source.child.pid

    def prepare(self, environment: Mapping[str, str]) -> None:
        """Starts the source, if there is to be one, with what the environments of all workers have in common."""
        self._environment = {name: value for name, value in environment.items() if name not in _OF_ONE_WORKER}
        if self._wanted not in (Imports.NOTHING, Imports.UNKNOWN):
            self._start_source()

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """The event loop runs now."""
        self._loop = loop
        if self._source is not None:
            self._watch(self._source)
        for line in self._pending:
            self._watch_line(line)
        if self._wanted is Imports.UNKNOWN:
            loop.call_later(_LATE_START_S, self._start_source)

    def start(self, launch: Launch) -> None:
        """Starts a worker the fastest way. Raises CannotStart if that is a cold start and fails."""
        if self._source is None or not self._same_for_source(launch) or not self._ask(self._source, launch):
            launch.cold()

    def settle(self) -> None:
        """Whoever still waits for the source is started cold: it is to be signalled, and so must be there."""
        while self._pending:
            self._give_up(next(iter(self._pending)))

    def close(self) -> None:
        """No worker is needed any more."""
        for line in list(self._pending):
            self._take(line)
        self._wanted = Imports.NOTHING
        if self._source is not None:
            self._forget_source().child.kill()

    # ---- workers -------------------------------------------------------------------------------------------------

    def _same_for_source(self, launch: Launch) -> bool:
        """Whether a fork is the same as a new process: what was read at import cannot be changed afterwards."""
        ours, theirs = launch.environment, self._environment
        different = sorted(
            name for name in {*ours, *theirs} if name.startswith(_READ_AT_IMPORT) and ours.get(name) != theirs.get(name)
        )
        if different:
            self._console.debug("cold-start", reason="own settings", names=",".join(different))
        return not different

    def _ask(self, source: _Source, launch: Launch) -> bool:
        from ...protocol import standby as protocol

        environment = protocol.pack_environment(dict(launch.environment))
        if len(environment) > self._room:
            self._console.debug("cold-start", reason="large environment", bytes=len(environment))
            return False
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        file = os.memfd_create("environment")
        try:
            os.write(file, environment)
            os.lseek(file, 0, os.SEEK_SET)
            fds = [file, theirs.fileno(), _descriptor(launch.stdout, 1), _descriptor(launch.stderr, 2)]
            socket.send_fds(source.control, [protocol.encode(protocol.Fork(self._needs()))], fds)
        except OSError as error:  # the source is gone, or its queue is full
            self._console.debug("cold-start", reason=str(error))
            ours.close()
            return False
        finally:
            os.close(file)
            theirs.close()
        ours.setblocking(False)
        self._pending[ours] = launch
        if self._loop is not None:
            self._watch_line(ours)
        return True

    def _needs(self) -> int:
        from ...protocol import standby as protocol

        return protocol.CORE if self._wanted is Imports.TORCH else protocol.EVERYTHING

    def _watch_line(self, line: socket.socket) -> None:
        assert self._loop is not None
        self._loop.add_reader(line, self._on_line, line)
        warm = self._source is not None and self._source.ready
        self._limit(line, _FORK_LIMIT_S if warm else _WARM_LIMIT_S)

    def _limit(self, line: socket.socket, seconds: float) -> None:
        """From now on; whatever limit there was."""
        assert self._loop is not None
        if line in self._limits:
            self._limits[line].cancel()
        self._limits[line] = self._loop.call_later(seconds, self._overdue, line)

    def _on_line(self, line: socket.socket) -> None:
        """A worker is there, or will never be."""
        from ...protocol import standby as protocol
        from ...protocol.messages import MessageError

        try:
            data, fds, _, _ = socket.recv_fds(line, protocol.MAX_PACKET_BYTES, 1)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        if not data or not fds:
            self._give_up(line)
            return
        os.set_inheritable(fds[0], False)
        try:
            child = processes.Child(protocol.decode_from_worker(data).pid, fds[0])
        except MessageError as error:
            self._console.log("bad-message", peer="a forked worker", reason=error)
            os.close(fds[0])
            self._give_up(line)
            return
        with contextlib.suppress(OSError):  # it is dead already: its pidfd will tell
            line.send(b"!")
        self._console.debug("forked", pid=child.pid)
        self._take(line).started(child)

    def _take(self, line: socket.socket) -> Launch:
        if self._loop is not None:
            self._loop.remove_reader(line)
        line.close()
        if line in self._limits:
            self._limits.pop(line).cancel()
        return self._pending.pop(line)

    def _give_up(self, line: socket.socket) -> None:
        self._take(line).cold()

    def _overdue(self, line: socket.socket) -> None:
        source = self._source
        if source is not None and source.ready:
            self._console.log("standby-stuck", pid=source.child.pid, action="replaced")
            source.child.signal_session(signal.SIGKILL)
        else:
            self._console.log("standby-slow", seconds=f"{_WARM_LIMIT_S:.0f}", action="cold starts")
        self.settle()

    # ---- the source ----------------------------------------------------------------------------------------------

    def _start_source(self) -> None:
        import json

        from ...protocol import standby as protocol

        if self._source is not None or self._wanted is Imports.NOTHING:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        hook = str(Path(__file__).parents[2] / "standby" / "hook")
        path = self._environment.get("PYTHONPATH")
        options = {
            "control": theirs.fileno(),
            "agent": os.getpid(),
            "python_path": path,
            "needs": self._needs(),
            "preload": self._preload,
            "inprocess": self._inprocess,
            "compiler": self._wanted is Imports.COMPILER,
        }
        environment = {
            **self._environment,
            "PYTHONPATH": os.pathsep.join([hook, *([path] if path else [])]),
            protocol.OPTIONS: json.dumps(options),
            protocol.ROOM: "." * _ROOM_BYTES,
        }
        try:
            (command,) = self._commands
            child = processes.start(command, environment, pass_fds=(theirs.fileno(),))
        except OSError as error:
            ours.close()
            self._off(str(error))
            return
        finally:
            theirs.close()
        ours.setblocking(False)
        self._room = sum(len(os.fsencode(f"{name}={value}")) + 1 for name, value in environment.items())
        self._source = _Source(child, ours)
        if self._loop is not None:
            self._watch(self._source)

    def _watch(self, source: _Source) -> None:
        assert self._loop is not None
        self._loop.add_reader(source.control, self._on_control, source)
        self._loop.add_reader(source.child.pidfd, self._on_source_exit, source)

    def _on_control(self, source: _Source) -> None:
        from ...protocol import standby as protocol

        message = self._receive(source)
        if isinstance(message, protocol.Refused):
            self._wanted = Imports.NOTHING
            self._off(message.reason)
        elif isinstance(message, protocol.Spoiled):
            self._wanted = Imports.ALL
            source.spoiled = True
            self._console.log("standby-spoiled", reason=message.reason, action="another, which does not import that")
        elif message is not None:
            self._deaths = 0
            source.ready = not message.busy
            self._console.debug("standby-ready" if source.ready else "standby-busy", pid=source.child.pid)
            for line in self._pending:
                self._limit(line, _FORK_LIMIT_S if source.ready else _WARM_LIMIT_S)

    def _receive(self, source: _Source) -> protocol.FromSource | None:
        from ...protocol import standby as protocol
        from ...protocol.messages import MessageError

        try:
            data = source.control.recv(protocol.MAX_PACKET_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        if not data:  # its pidfd tells the rest
            assert self._loop is not None
            self._loop.remove_reader(source.control)
            return None
        try:
            return protocol.decode_from_source(data)
        except MessageError as error:
            self._console.log("bad-message", peer="the standby source", reason=error)
            source.child.signal_session(signal.SIGKILL)
            return None

    def _on_source_exit(self, source: _Source) -> None:
        """What it was asked for and has not done has ended with its end of the lines."""
        self._on_control(source)  # its last words
        pid, ready, spoiled = source.child.pid, source.ready, source.spoiled
        self._forget_source().child.reap()
        if self._wanted is Imports.NOTHING:
            return
        self._deaths += 1
        if self._deaths >= _DEATHS:
            self._wanted = Imports.NOTHING
            self._off(f"{self._deaths} sources died before they were warm")
            return
        if not spoiled:
            self._console.log("standby-lost", pid=pid, warm=ready, action="replaced")
        self._start_source()

    def _forget_source(self) -> _Source:
        source, self._source = self._source, None
        assert source is not None
        if self._loop is not None:
            self._loop.remove_reader(source.control)
            self._loop.remove_reader(source.child.pidfd)
        source.control.close()
        return source

    def _off(self, reason: str) -> None:
        self._console.log("standby-off", reason=reason, action="cold starts")


def _descriptor(stream: BinaryIO | int | None, default: int) -> int:
    if stream is None:
        return default
    return stream if isinstance(stream, int) else stream.fileno()
