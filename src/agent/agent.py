"""The agent: a thin shell around the decisions of `control/`.

Owns: the event loop, signals, and the beginning and the end of a launch. What happens on this node goes to the head as
events; the commands that come back are carried out by `node/local.py`, in order. Whose job it is, one node's
(`node/sole.py`) or many nodes' (`node/cluster.py`), and when its deadlines are, is the head's business. It decides
nothing itself.
Called by: the launcher, with one `LaunchConfig`. Must never import torch.

The first processes are started before asyncio, ZeroMQ and the store server are even imported: those load while the
workers' interpreters start. Their events wait in pidfds, sockets and signals until the loop runs.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any

from ..control.job import commands as cmd
from ..control.job import events as ev
from . import processes
from .config import LaunchConfig
from .environment import OMP_NOTICE
from .node.gpus import GpuWatch
from .node.local import LocalNode
from .node.sole import SoleHead
from .output.console import Console

if TYPE_CHECKING:
    import asyncio
    from pathlib import Path

    from ..control.job.commands import Cause
    from .node.cluster import ClusterHead
    from .output.failures import ProcessFailure


class Agent:
    """Runs one launch to its end. `run` is called once."""

    def __init__(self, config: LaunchConfig) -> None:
        self._config = config
        self.console = Console()
        self._node = LocalNode(config, self.console, self._dispatch)
        self._gpus = GpuWatch(self.console, self._node.workers, self._dispatch, self._leave)
        self._head: SoleHead | ClusterHead = self._make_head()
        self._end: cmd.End | None = None
        self._early_signals: list[int] = []
        self._forwarded: list[int] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Event | None = None
        self._hears_signals = threading.current_thread() is threading.main_thread()

    def _make_head(self) -> SoleHead | ClusterHead:
        if self._config.cluster is None:
            return SoleHead(self._config, self._node, self._conclude)
        from .node.cluster import ClusterHead

        return ClusterHead(self._config, self.console, self._node, self._conclude)

    def run(self) -> cmd.End:
        """Blocks until the job is over and nothing of it is left. On another thread than the main one no signals."""
        with processes.subreaper(), processes.many_descriptors():
            self._run()
        assert self._end is not None
        return self._end

    def _run(self) -> None:
        if self._config.nproc_per_node > 1 and "OMP_NUM_THREADS" not in os.environ:
            self.console.write(OMP_NOTICE)
        restore_signals = self._catch_signals()
        try:
            self._node.prepare()
            try:
                self._head.begin()
            except OSError as error:
                self._conclude(cmd.End(cmd.EXIT_FAILED, f"cannot start the workers: {error}"))
            if self._end is None:
                import asyncio

                asyncio.run(self._serve())
        finally:
            restore_signals()
            self._clean_up()

    def failures(self, cause: Cause | None) -> dict[int, ProcessFailure]:
        """Which workers failed, by rank, once the job has ended with `cause`."""
        return self._node.workers.failures.of_job(cause, self._node.workers.pids)

    # ---- the loop ------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        import asyncio

        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._loop.set_exception_handler(self._on_bug)
        for signum in self._config.signals if self._hears_signals else ():
            if signal.getsignal(signum) != signal.SIG_IGN:
                self._loop.add_signal_handler(signum, self._on_signal, signum)
        for signum in self._forwarded:
            self._loop.add_signal_handler(signum, self._on_signal, signum)
        await self._node.serve(self._loop)
        try:
            await self._head.serve(self._loop)
        except OSError as error:
            self._conclude(cmd.End(cmd.EXIT_FAILED, str(error)))
        self._gpus.start(self._loop)
        for early in self._early_signals:
            self._on_signal(early)
        try:
            if self._end is None:
                await self._ended.wait()
        finally:
            await self._node.stop_serving()
            if self._hears_signals:
                signal.set_wakeup_fd(-1)  # a child that ends now must not be told to a loop that is half closed

    def _dispatch(self, event: Any) -> None:
        """An event of this node."""
        self._head.handle(event)

    # ---- what happens --------------------------------------------------------------------------------------------

    def _catch_signals(self) -> Any:
        """Until the loop runs, stop signals are kept; a signal the launcher was started to ignore stays ignored."""
        if not self._hears_signals:
            self.console.log("no-signals", reason="not on the main thread, where Python handles them")
            return lambda: None
        wanted = (*self._config.signals, *self._config.forwarded_signals, signal.SIGCHLD)
        before = {signum: signal.getsignal(signum) for signum in wanted}
        # A handler for these that the program around a launch has is the program's business.
        self._forwarded = [signum for signum in self._config.forwarded_signals if before[signum] == signal.SIG_DFL]

        def keep(signum: int, frame: object) -> None:
            self._early_signals.append(signum)

        for signum in self._config.signals:
            if before[signum] != signal.SIG_IGN:
                signal.signal(signum, keep)
        for signum in self._forwarded:
            signal.signal(signum, keep)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored, the kernel forgets exit codes

        def restore() -> None:
            for signum, handler in before.items():
                signal.signal(signum, handler if handler is not None else signal.SIG_DFL)

        return restore

    def _on_signal(self, signum: int) -> None:
        if signum in self._forwarded:
            self._node.workers.forward(signum)
            return
        self.console.log("signal", name=signal.Signals(signum).name)
        self._dispatch(ev.StopRequested(signum))

    def _leave(self, reason: str) -> None:
        """This node cannot go on; on the others the job does, if it may."""
        if self._end is None:
            self._conclude(cmd.End(cmd.EXIT_FAILED, reason))

    def _on_bug(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An error of our own in a callback: a job whose supervisor has missed something is ended, not left to hang."""
        import traceback

        error = context.get("exception")
        if self._end is not None:  # the consequences of the first one
            return
        if isinstance(error, processes.CannotStart):  # no bug: a full disk, no more processes, a program that is gone
            self._conclude(cmd.End(cmd.EXIT_FAILED, f"cannot go on: {error}"))
            return
        if error is not None:
            self.console.write("".join(traceback.format_exception(type(error), error, error.__traceback__)))
        self._conclude(cmd.End(1, f"internal error of hyperpodrun: {context.get('message')}: {error!r}"))

    # ---- the end -------------------------------------------------------------------------------------------------

    def _conclude(self, command: cmd.End) -> None:
        self._end = command = self._node.in_full(command)
        self._head.conclude()
        self._node.workers.concluded(command)
        if self._ended is not None:
            self._ended.set()

    def _tell_failure(self, logs: Path | None) -> None:
        """Why the job failed, in one line; the banner shows the traceback that no worker has shown."""
        if self._end is None or self._end.exit_code == 0:
            return
        left = ",".join(map(str, self._end.left_behind)) or None
        self.console.log("failed", exit_code=self._end.exit_code, reason=self._end.reason, left_behind=left, logs=logs)

    def _clean_up(self) -> None:
        """Whatever happened, nothing of the job stays."""
        self._gpus.close()
        self._node.close()
        self._head.close()
        logs = self._node.logs
        logs.close()
        logs.written()
        is_kept = self._node.has_run or not logs.discard_if_empty()
        self._tell_failure(logs.path if is_kept else None)
        if self._end is not None and self._end.exit_code == 0:
            logs.discard()
        self.console.close()
