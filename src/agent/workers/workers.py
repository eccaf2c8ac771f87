"""The processes of this node: workers, the standby source, hooks, the keeper, and what they left behind.

Owns: who runs, and the one moment at which each is known to be gone. Whether and when one is started, signalled or
replaced is decided elsewhere. Called by: `node/local.py`. Never blocks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from .. import processes
from ..config import LaunchConfig
from ..directories import Owned
from ..environment import worker_command
from ..keeper import cleans_up, remove_tree, socket_folders
from ..output.console import Console
from ..output.failures import Failures
from ..output.logs import LogDirectory, Outputs
from ..output.torch_events import TorchEvents
from .data_host import DataHost
from .standby import Launch, Standbys

if TYPE_CHECKING:
    import asyncio

    from ...control.job.commands import End


class Worker:
    """The process of one local rank."""

    def __init__(self, rank: int, local_rank: int, incarnation: int, outputs: Outputs) -> None:
        self.rank = rank
        """In the job; it can change from epoch to epoch."""
        self.local_rank = local_rank
        self.incarnation = incarnation
        self.outputs = outputs
        self.child: processes.Child | None = None
        """None: it has been asked of the standby source and is not there yet."""
        self.attached = False


class Workers:
    """Starts, watches and signals the processes of this node."""

    def __init__(
        self,
        config: LaunchConfig,
        console: Console,
        logs: LogDirectory,
        token: str,
        directories: Sequence[Owned],
        data: DataHost,
        on_exit: Callable[[Worker, int], None],
        on_hook_exit: Callable[[int], None],
    ) -> None:
        self._config = config
        self._console = console
        self._logs = logs
        self._token = token
        self._directories = directories
        self._data = data
        self._on_worker_exit = on_exit
        self._on_hook_end = on_hook_exit
        self.failures = Failures()
        self.events = TorchEvents(config, console)
        self.on_started: Callable[[int, int], None] | None = None
        """Called with rank and pid, once the loop runs."""
        self.pids: dict[int, int] = {}
        """The latest process of every rank that this node has held, dead or alive."""
        self._by_local_rank: dict[int, Worker] = {}
        self._hook: tuple[processes.Child, Outputs] | None = None
        self._standbys = Standbys(config, console)
        self._strangers = frozenset(processes.children())
        """Children of whoever runs this agent in its process; they are none of the job's business."""
        self._keeper = processes.Keeper(token, directories)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = False
        self._folders: set[str] = set()
        """Of processes that have been told to end, and may do so without a last word."""

    # ---- who is there --------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Worker]:
        return iter(list(self._by_local_rank.values()))

    def __bool__(self) -> bool:
        return bool(self._by_local_rank)

    def find(self, local_rank: int, incarnation: int) -> Worker | None:
        """The worker, unless it is gone or was replaced."""
        worker = self._by_local_rank.get(local_rank)
        return worker if worker is not None and worker.incarnation == incarnation else None

    def rank_of(self, pid: int) -> int | None:
        """Of a process of this node, if it is a worker's. May be asked on any thread."""
        return next((rank for rank, known in self.pids.copy().items() if known == pid), None)

    # ---- lives ---------------------------------------------------------------------------------------------------

    def prepare(self, environment: Mapping[str, str]) -> None:
        """Starts the standby source, if there is to be one."""
        self._standbys.prepare(environment)

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """The event loop runs now: what has happened before is seen at once."""
        self._loop = loop
        if threading.current_thread() is threading.main_thread():  # elsewhere they wait for the end of a worker
            loop.add_signal_handler(signal.SIGCHLD, self.reap_orphans)
        self._standbys.attach(loop)
        for worker in self:
            self._watch(worker)
        if self._hook is not None:
            loop.add_reader(self._hook[0].pidfd, self._on_hook_exit)
        self.reap_orphans()  # whose SIGCHLD came before its handler

    def expect(self, worker: Worker) -> None:
        """`worker` takes its local rank; its process will be started when its files are open."""
        self._by_local_rank[worker.local_rank] = worker

    def spawn(self, worker: Worker, environment: Mapping[str, str]) -> None:
        """Starts the process of a `worker` that is expected."""

        def started(child: processes.Child) -> None:
            worker.outputs.started()
            worker.child = child
            self.pids[worker.rank] = child.pid
            self.events.started(child.pid, worker.local_rank, environment)
            if self._loop is not None:
                self._watch(worker)
            if self.on_started is not None:
                self.on_started(worker.rank, child.pid)

        command = worker_command(self._config, worker.local_rank)
        self._standbys.start(Launch(command, environment, worker.outputs.stdout, worker.outputs.stderr, started))

    def take_rank(self, worker: Worker, rank: int) -> None:
        """The world has numbered its ranks anew."""
        if worker.rank != rank and worker.child is not None:
            self.pids.pop(worker.rank, None)
            self.pids[rank] = worker.child.pid
        worker.rank = rank

    def run_hook(self, script: tuple[str, ...], environment: Mapping[str, str], outputs: Outputs) -> None:
        """Starts the script before or after training."""
        child = processes.start(script, environment, stdout=outputs.stdout, stderr=outputs.stderr)
        outputs.started()
        self._hook = (child, outputs)
        if self._loop is not None:
            self._loop.add_reader(child.pidfd, self._on_hook_exit)

    def kill(self, worker: Worker, reason: str) -> None:
        """SIGKILL for one process and all it started."""
        self._settle()
        assert worker.child is not None
        self._console.log("kill", rank=worker.rank, pid=worker.child.pid, reason=reason)
        self._kill_group(worker.child)

    def _kill_group(self, child: processes.Child) -> None:
        folders = socket_folders(processes.group_members(child.pid))
        child.signal_session(signal.SIGKILL)
        self._remove(folders)

    def _remove(self, folders: set[str]) -> None:
        """Folders of processes that have been killed. On the thread for files."""
        for folder in folders:
            self._logs.disk.begin(partial(remove_tree, folder))

    def stop(self, signum: int) -> None:
        """A signal for every process and hook."""
        self.failures.stopping(signum)
        self._settle()
        children = [worker.child for worker in self if worker.child is not None]
        if self._hook is not None:
            children.append(self._hook[0])
        for child in children:
            self._folders |= socket_folders(processes.group_members(child.pid))
            child.signal_session(signum)
            child.signal_session(signal.SIGCONT)  # a stopped process would not see it

    def _settle(self) -> None:
        """Every process that has been asked for is there."""
        self._logs.settle()
        self._standbys.settle()

    def concluded(self, end: End) -> None:
        """The job is over; told after what was told of workers."""
        self._logs.disk.begin(lambda: self.events.concluded(end))

    def forward(self, signum: int) -> None:
        """A signal that asks for something else than the end: nobody dies of it who is not prepared for it."""
        told: list[str] = []
        others: list[str] = []
        for worker in self:
            caught = [] if worker.child is None else processes.who_catches(worker.child.pid, signum)
            for pid in caught:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signum)
            (told if caught else others).append(str(worker.rank))
        ranks = {"told": ",".join(told) or None, "no_handler": ",".join(others) or None}
        self._console.log("signal", name=signal.Signals(signum).name, **ranks)

    def close(self) -> None:
        """Whatever happened, no process of the job stays."""
        self._closing = True
        self._standbys.close()
        self._data.close()
        left = [worker.child for worker in self if worker.child is not None]
        if self._hook is not None:
            left.append(self._hook[0])
        for child in left:
            self._kill_group(child)
        self._keeper.dismiss()
        for child in left:
            child.kill()  # the keeper has seen to it: here it is taken away
        self.reap_orphans()
        self._remove(self._folders)

    # ---- ends ----------------------------------------------------------------------------------------------------

    def _watch(self, worker: Worker) -> None:
        assert self._loop is not None
        if worker.child is not None:
            self._loop.add_reader(worker.child.pidfd, self._on_exit, worker, worker.child)

    def _on_exit(self, worker: Worker, child: processes.Child) -> None:
        assert self._loop is not None
        self._loop.remove_reader(child.pidfd)
        if self._by_local_rank.get(worker.local_rank) is worker:
            del self._by_local_rank[worker.local_rank]
        exit_code = child.reap()
        self._logs.ended(worker.outputs)
        if exit_code != 0:
            self._kill_group(child)
        error_file = worker.outputs.error_file
        read = self.failures.ended(worker.rank, worker.local_rank, child.pid, exit_code, error_file)
        self._logs.disk.begin(lambda: self.events.ended(child.pid, exit_code, failed=read()))
        self._on_worker_exit(worker, exit_code)
        self.reap_orphans()

    def _on_hook_exit(self) -> None:
        assert self._loop is not None
        assert self._hook is not None
        child, outputs = self._hook
        self._hook = None
        self._loop.remove_reader(child.pidfd)
        exit_code = child.reap()
        self._logs.ended(outputs)
        self._on_hook_end(exit_code)

    def reap_orphans(self) -> None:
        """What a dead worker left behind has become our child: it is killed, and taken away once it is dead."""
        own = {worker.child.pid for worker in self if worker.child is not None}
        own.add(self._keeper.pid)
        own |= {pid for pid in (self._standbys.pid, self._data.pid) if pid is not None}
        if self._hook is not None:
            own.add(self._hook[0].pid)
        live = {f"{worker.local_rank}.{worker.incarnation}" for worker in self}
        for pid in processes.children():
            if pid in own or pid in self._strangers or processes.in_own_session(pid):
                continue
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG)[0] == pid:
                    continue
            mark = processes.worker_mark(pid)
            if mark is not None and mark not in live and not cleans_up(pid):
                self._remove(socket_folders([pid]))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if not self._keeper.alive() and not self._closing:
            self._console.log("keeper-lost", pid=self._keeper.pid, action="replaced")
            self._keeper = processes.Keeper(self._token, self._directories)
