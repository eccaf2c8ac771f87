"""The agent: a thin shell around `control.job.Job`.

Owns: the node's processes, endpoints and timers. It turns what happens (a pidfd, a message, a signal, a deadline) into
events for the job, executes the commands that come back in order, and decides nothing itself.
Called by: the launcher, with one `LaunchConfig`. Must never import torch.

The first processes are started before asyncio, ZeroMQ and the store server are even imported: those load while the
workers' interpreters start. Their events wait in pidfds, sockets and signals until the loop runs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING, Any

from ..control import commands as cmd
from ..control import events as ev
from ..control.job import Job
from ..control.state import JobConfig
from ..rootless.listening import listen
from . import processes
from .config import DEFAULT_BARRIER_TIMEOUT, DEFAULT_START_TIMEOUT, LaunchConfig
from .console import Console
from .directories import make_private, temporary_for_sockets
from .environment import OMP_NOTICE, epoch_environment, worker_command, worker_environment
from .failures import Failures
from .logs import LogDirectory, Outputs
from .standby import Launch, Standbys
from .torch_events import TorchEvents

if TYPE_CHECKING:
    import asyncio

    from ..control.commands import Cause
    from ..protocol import messages
    from ..rootless.server import StoreServer
    from .channel import WorkerChannel
    from .failures import ProcessFailure
    from .recovery_report import Recovery, RecoveryReport

_STORE_HOST = "localhost"


class _Worker:
    """The process of one local rank, as this shell sees it."""

    def __init__(self, rank: int, incarnation: int, outputs: Outputs) -> None:
        self.rank = rank
        self.incarnation = incarnation
        self.outputs = outputs
        self.child: processes.Child | None = None
        """None: it has been asked of the standby source and is not there yet."""
        self.attached = False


class Agent:
    """Runs one launch to its end. `run` is called once."""

    def __init__(self, config: LaunchConfig) -> None:
        self._config = config
        self.console = Console()
        self._listeners = listen(_STORE_HOST, config.rendezvous.port)
        self._logs = LogDirectory(config, self.console)
        self._token = os.urandom(8).hex()
        self._job = Job(job_config(config))
        self._failures = Failures()
        self._events = TorchEvents(config, self.console)
        self._opened_epoch = 0
        self._runtime = make_private(temporary_for_sockets(), "hyperpodrun-")
        self._workers: dict[int, _Worker] = {}
        self._pids: dict[int, int] = {}
        """The latest process of every rank, dead or alive."""
        self._hook: tuple[processes.Child, Outputs] | None = None
        self._standbys = Standbys(config, self.console)
        self._keeper = processes.Keeper(self._token, self._runtime)
        self._end: cmd.End | None = None
        self._early_signals: list[int] = []
        self._fault_seen_ns: dict[int, int] = {}
        """When somebody first felt the fault of an epoch."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Event | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._store: StoreServer | None = None
        self._channel: WorkerChannel | None = None
        self._report: RecoveryReport | None = None
        self._executors: dict[type, Any] = {
            cmd.RunHook: self._run_hook,
            cmd.Spawn: self._spawn,
            cmd.Kill: self._kill,
            cmd.StopWorkers: self._stop_workers,
            cmd.OpenEpoch: self._open_epoch,
            cmd.FailEpoch: self._fail_epoch,
            cmd.StartEpoch: self._start_epoch,
            cmd.FinishEpoch: self._finish_epoch,
            cmd.RestartProcesses: self._restart_processes,
            cmd.End: self._conclude,
        }

    def run(self) -> cmd.End:
        """Blocks until the job is over and nothing of it is left."""
        processes.become_subreaper()
        if self._config.nproc_per_node > 1 and "OMP_NUM_THREADS" not in os.environ:
            self.console.write(OMP_NOTICE)
        restore_signals = self._catch_signals()
        try:
            self._standbys.prepare(self._environment(0, 0, 0, Outputs()))
            self._dispatch(ev.Begin())
            if self._end is None:
                import asyncio

                asyncio.run(self._serve())
        finally:
            restore_signals()
            self._clean_up()
        assert self._end is not None
        return self._end

    # ---- the loop ------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        import asyncio

        from ..rootless.server import StoreServer
        from .recovery_report import RecoveryReport

        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._loop.set_exception_handler(self._on_bug)
        self._report = RecoveryReport(self._config.run_id, self._config.nproc_per_node)
        for signum in self._config.signals:
            if signal.getsignal(signum) != signal.SIG_IGN:
                self._loop.add_signal_handler(signum, self._on_signal, signum)
        self._loop.add_signal_handler(signal.SIGCHLD, self._reap_orphans)
        self._store = StoreServer(sockets=self._listeners, epoch=self._opened_epoch, log=self._log_store)
        await self._store.start()
        if self._config.inprocess_restart:
            from .channel import WorkerChannel

            self._channel = WorkerChannel(self._endpoint, self.console, self._on_message)
        self._standbys.attach(self._loop)
        for worker in self._workers.values():
            self._watch(worker)
        if self._hook is not None:
            self._loop.add_reader(self._hook[0].pidfd, self._on_hook_exit)
        self._reap_orphans()  # whose SIGCHLD came before its handler
        for early in self._early_signals:
            self._on_signal(early)
        try:
            if self._end is None:
                await self._ended.wait()
        finally:
            if self._channel is not None:
                self._channel.close()
            await self._store.close()

    def _dispatch(self, event: ev.Event) -> None:
        for command in self._job.handle(event, time.monotonic()):
            self._executors[type(command)](command)
        if self._loop is None:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self._job.next_deadline()
        if deadline is not None and self._end is None:
            self._timer = self._loop.call_at(deadline, self._dispatch, ev.TimePassed())

    # ---- what happens --------------------------------------------------------------------------------------------

    def _catch_signals(self) -> Any:
        """Until the loop runs, stop signals are kept; a signal the launcher was started to ignore stays ignored."""
        before = {signum: signal.getsignal(signum) for signum in self._config.signals}

        def keep(signum: int, frame: object) -> None:
            self._early_signals.append(signum)

        for signum, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(signum, keep)

        def restore() -> None:
            for signum, handler in before.items():
                signal.signal(signum, handler if handler is not None else signal.SIG_DFL)

        return restore

    def _on_signal(self, signum: int) -> None:
        self.console.log("signal", name=signal.Signals(signum).name)
        self._dispatch(ev.StopRequested(signum))

    def _on_bug(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An error of our own in a callback: a job whose supervisor has missed something is ended, not left to hang."""
        import traceback

        error = context.get("exception")
        if self._end is not None:  # the consequences of the first one
            return
        if error is not None:
            self.console.write("".join(traceback.format_exception(type(error), error, error.__traceback__)))
        self._conclude(cmd.End(1, f"internal error of hyperpodrun: {context.get('message')}: {error!r}"))

    def _on_message(self, rank: int, incarnation: int, message: messages.WorkerMessage) -> None:
        from ..protocol import messages

        worker = self._workers.get(rank)
        if worker is None or worker.incarnation != incarnation:
            return
        assert self._report is not None
        match message:
            case messages.Attach():
                worker.attached = True
                self._dispatch(ev.Attached(rank, incarnation, message.abort_timeout_s))
            case messages.Arrive():
                self._report.arrived(message)
                self._dispatch(
                    ev.Arrived(
                        rank,
                        incarnation,
                        message.epoch,
                        message.call,
                        message.step,
                        message.healthy,
                        message.holding,
                    )
                )
            case messages.Registered():
                self._dispatch(ev.Registered(rank, incarnation, message.epoch, message.shard))
            case messages.Fault():
                self._note_fault(message.epoch, message.caught_ns)
                self._dispatch(
                    ev.Faulted(
                        rank,
                        incarnation,
                        message.epoch,
                        message.summary,
                        message.traceback,
                        message.consequence,
                    )
                )
            case messages.Stepped():
                assert self._store is not None
                self._dispatch(ev.Stepped(rank, incarnation, message.epoch, message.step))
                last_write = self._store.last_write_ns(message.epoch)
                self._tell(self._report.stepped(rank, message, last_write))
            case messages.Completed():
                self._dispatch(ev.Completed(rank, incarnation, message.epoch))

    def _watch(self, worker: _Worker) -> None:
        assert self._loop is not None
        if worker.child is not None:
            self._loop.add_reader(worker.child.pidfd, self._on_exit, worker, worker.child)

    def _on_exit(self, worker: _Worker, child: processes.Child) -> None:
        assert self._loop is not None
        self._note_fault(self._job.epoch, time.monotonic_ns())
        self._loop.remove_reader(child.pidfd)
        if self._workers.get(worker.rank) is worker:
            del self._workers[worker.rank]
        exit_code = child.reap()
        self._logs.ended(worker.outputs)
        if exit_code != 0:
            child.signal_session(signal.SIGKILL)
        failed = self._failures.ended(worker.rank, child.pid, exit_code, worker.outputs.error_file)
        self._events.ended(worker.rank, child.pid, exit_code, failed=failed)
        self._dispatch(ev.Exited(worker.rank, worker.incarnation, exit_code))
        self._reap_orphans()

    def _on_hook_exit(self) -> None:
        assert self._loop is not None
        assert self._hook is not None
        child, outputs = self._hook
        self._hook = None
        self._loop.remove_reader(child.pidfd)
        exit_code = child.reap()
        self._logs.ended(outputs)
        self._dispatch(ev.HookEnded(exit_code))

    def _reap_orphans(self) -> None:
        """What a dead worker left behind has become our child: it is killed, and taken away once it is dead."""
        own = {worker.child.pid for worker in self._workers.values() if worker.child is not None}
        own.add(self._keeper.pid)
        if self._standbys.pid is not None:
            own.add(self._standbys.pid)
        if self._hook is not None:
            own.add(self._hook[0].pid)
        live = {f"{worker.rank}.{worker.incarnation}" for worker in self._workers.values()}
        for pid in processes.children():
            if pid in own:
                continue
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG)[0] == pid:
                    continue
            mark = processes.worker_mark(pid)
            if mark is not None and mark not in live:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if not self._keeper.alive() and self._end is None:
            self.console.log("keeper-lost", pid=self._keeper.pid, action="replaced")
            self._keeper = processes.Keeper(self._token, self._runtime)

    def _note_fault(self, epoch: int, at_ns: int) -> None:
        self._fault_seen_ns[epoch] = min(at_ns, self._fault_seen_ns.get(epoch, at_ns))

    # ---- what the job wants --------------------------------------------------------------------------------------

    def _spawn(self, command: cmd.Spawn) -> None:
        outputs = self._logs.open(f"attempt_{command.epoch}", command.rank)
        environment = self._environment(command.rank, command.incarnation, command.epoch, outputs)
        worker = self._workers[command.rank] = _Worker(command.rank, command.incarnation, outputs)

        def started(child: processes.Child) -> None:
            outputs.started()
            worker.child = child
            self._pids[worker.rank] = child.pid
            self._events.started(worker.rank, child.pid, command.epoch)
            if self._loop is not None:
                self._watch(worker)
            if self._report is not None:
                self._report.respawned(worker.rank, child.pid)

        self._standbys.start(
            Launch(worker_command(self._config, command.rank), environment, outputs.stdout, outputs.stderr, started)
        )

    def _environment(self, rank: int, incarnation: int, epoch: int, outputs: Outputs) -> dict[str, str]:
        return worker_environment(
            self._config,
            local_rank=rank,
            incarnation=incarnation,
            epoch=epoch,
            store_address=self._store_address,
            agent_endpoint=self._endpoint if self._config.inprocess_restart else None,
            job_token=self._token,
            error_file=outputs.error_path,
        )

    def _run_hook(self, command: cmd.RunHook) -> None:
        script = self._config.pre_train if command.name == "pre" else self._config.post_train
        outputs = self._logs.open(f"{command.name}_train", 0)
        environment = worker_environment(
            self._config,
            local_rank=0,
            incarnation=0,
            epoch=self._job.next_epoch,
            store_address=self._store_address,
            agent_endpoint=None,
            job_token=self._token,
            error_file=outputs.error_path,
        )
        child = processes.start(script, environment, stdout=outputs.stdout, stderr=outputs.stderr)
        outputs.started()
        self._hook = (child, outputs)
        if self._loop is not None:
            self._loop.add_reader(child.pidfd, self._on_hook_exit)

    def _kill(self, command: cmd.Kill) -> None:
        worker = self._workers.get(command.rank)
        if worker is not None and worker.incarnation == command.incarnation:
            self._standbys.settle()
            assert worker.child is not None
            self.console.log("kill", rank=command.rank, pid=worker.child.pid, reason=command.reason)
            worker.child.signal_session(signal.SIGKILL)

    def _stop_workers(self, command: cmd.StopWorkers) -> None:
        signum = command.signum if command.signum is not None else self._config.shutdown_signal
        self._failures.stopping(signum)
        self._standbys.settle()
        children = [worker.child for worker in self._workers.values() if worker.child is not None]
        if self._hook is not None:
            children.append(self._hook[0])
        for child in children:
            child.signal_session(signum)
            child.signal_session(signal.SIGCONT)  # a stopped process would not see it

    def _open_epoch(self, command: cmd.OpenEpoch) -> None:
        if not self._workers:  # every process is new
            self._failures.forget()
        self._opened_epoch = command.epoch
        if self._store is not None:
            self._store.advance(command.epoch)

    def _fail_epoch(self, command: cmd.FailEpoch) -> None:
        from ..protocol import messages

        assert self._store is not None
        assert self._report is not None
        now_ns = time.monotonic_ns()
        self._store.cancel(command.epoch)
        notice = messages.FaultNotice(
            command.epoch, command.cause.summary, self._store.published_listeners(command.epoch)
        )
        self._send_all(notice)
        fault_ns = self._fault_seen_ns.get(command.epoch, now_ns)
        self._tell(self._report.failed(command.epoch, command.cause, fault_ns, now_ns, self._pids))

    def _start_epoch(self, command: cmd.StartEpoch) -> None:
        from ..protocol import messages

        assert self._report is not None
        assembled_ns = time.monotonic_ns()
        for worker in self._workers.values():
            environ = epoch_environment(self._config, worker.rank, command.epoch)
            self._send(worker, messages.Start(command.epoch, environ, command.plan))
        self._report.started(command.epoch, command.cause, assembled_ns, time.monotonic_ns())
        self._failures.forget()
        self._fault_seen_ns.clear()

    def _finish_epoch(self, command: cmd.FinishEpoch) -> None:
        from ..protocol import messages

        assert self._report is not None
        self._send_all(messages.Finish(command.epoch))
        self._tell(self._report.finished())

    def _restart_processes(self, command: cmd.RestartProcesses) -> None:
        assert self._report is not None
        self.console.log("restart", number=command.number, limit=command.limit, cause=command.cause.summary)
        self._tell(self._report.restarted(command.cause, self._pids))

    def _conclude(self, command: cmd.End) -> None:
        self._end = command
        self._events.concluded(command)
        if self._ended is not None:
            self._ended.set()

    def failures(self, cause: Cause | None) -> dict[int, ProcessFailure]:
        """Which workers failed, by rank, once the job has ended with `cause`."""
        return self._failures.of_job(cause, self._pids)

    # ---- small things --------------------------------------------------------------------------------------------

    @property
    def _store_address(self) -> tuple[str, int]:
        return self._config.rendezvous.host, self._listeners[0].getsockname()[1]

    @property
    def _endpoint(self) -> str:
        return f"ipc://{self._runtime}/agent.sock"

    def _send_all(self, message: messages.AgentMessage) -> None:
        for worker in self._workers.values():
            if worker.attached:
                self._send(worker, message)

    def _send(self, worker: _Worker, message: messages.AgentMessage) -> None:
        assert self._channel is not None
        self._channel.send(worker.rank, worker.incarnation, message)

    def _log_store(self, line: str) -> None:
        self.console.log("store", message=line)

    def _tell(self, recovery: Recovery | None) -> None:
        """A recovery is over: a line for people, a row for programs."""
        if recovery is None:
            return
        from .recovery_report import line

        self.console.log("recovery", **line(recovery))
        with self._logs.recoveries.open("ab") as file:
            file.write(recovery.as_json())

    def _tell_failure(self) -> None:
        """Why the job failed, in one line; the banner shows the traceback that no worker has shown."""
        if self._end is None or self._end.exit_code == 0:
            return
        left = ",".join(map(str, self._end.left_behind)) or None
        self.console.log(
            "failed", exit_code=self._end.exit_code, reason=self._end.reason, left_behind=left, logs=self._logs.path
        )

    def _clean_up(self) -> None:
        """Whatever happened, nothing of the job stays."""
        import shutil

        self._standbys.close()
        for worker in self._workers.values():
            if worker.child is not None:
                worker.child.signal_session(signal.SIGKILL)
        self._keeper.dismiss()
        for listener in self._listeners:
            listener.close()
        shutil.rmtree(self._runtime, ignore_errors=True)
        if self._report is not None:
            self._tell(self._report.finished())
            if self._report.recoveries:
                from .recovery_report import table

                self.console.write(table(self._report.recoveries))
        self._tell_failure()
        if self._end is not None and self._end.exit_code == 0 and not self._logs.recoveries.exists():
            self._logs.discard()
        self.console.close()


def job_config(config: LaunchConfig) -> JobConfig:
    """What of the launch concerns the decisions."""
    limit = config.inprocess_timeout
    return JobConfig(
        world_size=config.nproc_per_node,
        in_process=config.inprocess_restart,
        max_restarts=config.max_restarts,
        max_inprocess_restarts=config.max_inprocess_restarts,
        barrier_timeout=DEFAULT_BARRIER_TIMEOUT if limit is None else limit,
        start_timeout=DEFAULT_START_TIMEOUT if limit is None else limit,
        shutdown_timeout=config.shutdown_timeout,
        pre_train=bool(config.pre_train),
        post_train=bool(config.post_train),
    )
