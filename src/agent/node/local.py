"""One node: carries out what the job wants done here, and says what happens here.

Owns: the endpoints that workers talk to (the store, the channel) and the report of recoveries; `workers.py` has their
processes. Commands come in, events go out through the callback it was given; it decides nothing. Must never import
torch. Called by: `agent.py`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ...control.job import commands as cmd
from ...control.job import events as ev
from ...protocol.plan import NO_EPOCH
from ...rootless.listening import listen
from .. import processes
from ..config import LaunchConfig
from ..environment import epoch_environment, with_script_in, worker_environment
from ..output.console import Console
from ..output.logs import LogDirectory, Outputs
from ..output.tracebacks import Tracebacks
from ..workers.data_host import DataHost
from ..workers.workers import Worker, Workers
from .directories import JobDirectories
from .file_timers import FILE, FileTimers, pipe_for
from .own_listeners import of_this_node

if TYPE_CHECKING:
    import asyncio

    from ...protocol import messages
    from ...rootless.server import StoreServer
    from ...rootless.shard_messages import StoreMessage
    from ...rootless.shards import Shards
    from ..output.recovery_report import Recovery, RecoveryReport
    from .channel import WorkerChannel
    from .health_check import HealthCheck
    from .plain_store import PlainStore

_STORE_HOST = "localhost"
_C = TypeVar("_C", bound=cmd.Command)
Finder = Callable[[int], "tuple[str, int] | None"]
"""Where a node's store listens for the workers of all nodes."""
_SAID_BY_WORKERS = (ev.Attached, ev.Arrived, ev.Registered, ev.Faulted, ev.Stepped, ev.Holds, ev.Completed)


class LocalNode:
    """The hands of one agent. Commands may come before there is an event loop; `serve` then begins to listen."""

    def __init__(self, config: LaunchConfig, console: Console, on_event: Callable[[ev.Event], None]) -> None:
        self._console = console
        self._on_event = on_event
        self._token = os.urandom(8).hex()
        with contextlib.ExitStack() as undo:  # a start that fails leaves nothing behind
            self._listeners = listen(_STORE_HOST, config.rendezvous.port)
            undo.callback(self._close_listeners)
            self.logs = LogDirectory(config, console)
            undo.callback(self.logs.discard_if_empty)
            self._directories = JobDirectories(self._token, console)
            undo.callback(self._directories.remove)
            self._runtime = self._directories.make_runtime()
            self._config = config = with_script_in(config, self._runtime)
            self._state_directory = self._directories.make_state() if config.inprocess_restart else None
            self._timer_pipe = pipe_for(self._runtime, os.environ)
            self._timers: FileTimers | None = None
            self._data = DataHost(self._runtime, self._token, console)
            self.workers = Workers(
                config, console, self.logs, self._token, self._directories.made, self._data,
                self._on_exit, self._on_hook_exit,
            )  # fmt: skip
            undo.pop_all()
        self.has_run = False
        """Whether a worker was ever started here."""
        self._epoch = NO_EPOCH
        """The last epoch that was started here."""
        self._opened_epoch = 0
        self._tracebacks = Tracebacks()
        self._fault_seen_ns: dict[int, int] = {}
        """When somebody first felt the fault of an epoch."""
        self._store: StoreServer | None = None
        self._sharing: Shards | None = None
        self._plain: PlainStore | None = None
        self._channel: WorkerChannel | None = None
        self._health_check: HealthCheck | None = None
        self.report: RecoveryReport | None = None
        self._executors: dict[type, Any] = {
            cmd.RunHook: self._run_hook,
            cmd.Spawn: self._spawn,
            cmd.Kill: self._kill,
            cmd.StopWorkers: self._stop_workers,
            cmd.OpenEpoch: self._open_epoch,
            cmd.FailEpoch: self._fail_epoch,
            cmd.StartEpoch: self._start_epoch,
            cmd.FinishEpoch: self._finish_epoch,
            cmd.TellReturned: self._tell_returned,
            cmd.RestartProcesses: self._restart_processes,
        }

    # ---- life ----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Before anything else: the standby source imports while the rest comes up."""
        if self._timer_pipe is not None:
            self._timers = FileTimers(self._timer_pipe, self._token, self._console, self.workers.rank_of)
        self.workers.prepare(self._environment(cmd.LocalSlot(0, 0, 0), self._alone, 0, Outputs()))

    async def serve(self, loop: asyncio.AbstractEventLoop) -> None:
        """The event loop runs: what has happened since `prepare` is seen now."""
        from ...rootless.server import StoreServer
        from ..output.recovery_report import RecoveryReport
        from .health_check import health_check

        self._health_check = health_check(os.environ, self._console, self._problem)
        self.report = RecoveryReport(self._config.run_id, self._config.nproc_per_node)
        self.workers.on_started = self.report.respawned
        self._store = StoreServer(
            sockets=self._listeners,
            epoch=self._opened_epoch,
            users=processes.users_of_descendants,
            log=self._log_store,
        )
        await self._store.start()
        if self._config.inprocess_restart:
            from .channel import WorkerChannel

            self._channel = WorkerChannel(self._endpoint, self._console, self._on_message)
        self.logs.attach(loop)
        self._data.attach(loop, self._environment(cmd.LocalSlot(0, 0, 0), self._alone, 0, Outputs()))
        self.workers.attach(loop)
        self._directories.begin_removing_orphaned()

    def share_store(self, send: Callable[[int, StoreMessage], None], own: Callable[[], int]) -> Shards:
        """The store is one of many: `send(node, message)`."""
        assert self._store is not None
        self._sharing = self._store.share(send, own)
        return self._sharing

    def serve_plainly(self, host: str, port: int, own: Callable[[], int], find: Finder) -> None:
        """One node's store is everybody's: this node's listens there, too. Raises OSError."""
        from .plain_store import PlainStore

        assert self._store is not None
        self._plain = PlainStore(self._store.network_door(), host, port, own, find)

    async def stop_serving(self) -> None:
        """The endpoints close; processes are `close`'s."""
        if self._health_check is not None:
            self._health_check.close()
        if self._channel is not None:
            self._channel.close()
        if self._store is not None:
            await self._store.close()
        if self._plain is not None:
            self._plain.close()

    def close(self) -> None:
        """Whatever happened, nothing of the job stays."""
        self.workers.close()
        if self._timers is not None:
            self._timers.close()
        self._close_listeners()
        self._directories.remove()
        if self.report is not None:
            self._tell(self.report.finished())
            if any(recovery.epoch is not None for recovery in self.report.recoveries):  # else none was ours
                from ..output.recovery_report import table

                self._console.write(table(self.report.recoveries))

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.close()

    # ---- what the job wants --------------------------------------------------------------------------------------

    def execute(self, command: cmd.Command) -> None:
        """Carries out one command. Raises CannotStart when a process cannot be started."""
        self._executors[type(command)](self.in_full(command))

    def in_full(self, command: _C) -> _C:
        """The command with all that is known here of its cause."""
        return self._tracebacks.in_full(command)

    def _spawn(self, command: cmd.Spawn) -> None:
        slot = cmd.LocalSlot(command.rank, command.local_rank, command.incarnation)
        worker = Worker(slot.rank, slot.local_rank, slot.incarnation, Outputs())
        self.workers.expect(worker)

        def start(outputs: Outputs) -> None:
            worker.outputs = outputs
            self.workers.spawn(worker, self._environment(slot, command.layout, command.epoch, outputs))
            self.has_run = True

        self.logs.open(f"attempt_{command.epoch}", slot.local_rank, slot.rank, start)

    def _environment(
        self, slot: cmd.LocalSlot, layout: cmd.Layout, epoch: int, outputs: Outputs, *, hook: bool = False
    ) -> dict[str, str]:
        environment = worker_environment(
            self._config,
            slot=slot,
            layout=layout,
            epoch=epoch,
            store_address=self._store_address,
            own_store=self._own_store,
            agent_endpoint=self._endpoint if self._config.inprocess_restart and not hook else None,
            state_directory=None if hook else self._state_directory,
            data_endpoint=None if hook else self._data.endpoint,
            job_token=self._token,
            error_file=outputs.error_path,
        )
        if self._timer_pipe is not None:
            environment[FILE] = str(self._timer_pipe)
        return environment

    def _run_hook(self, command: cmd.RunHook) -> None:
        script = self._config.pre_train if command.name == "pre" else self._config.post_train

        def start(outputs: Outputs) -> None:
            environment = self._environment(cmd.LocalSlot(0, 0, 0), command.layout, command.epoch, outputs, hook=True)
            self.workers.run_hook(script, environment, outputs)

        self.logs.open(f"{command.name}_train", 0, None, start)

    def _kill(self, command: cmd.Kill) -> None:
        worker = self.workers.find(command.local_rank, command.incarnation)
        if worker is not None:
            self.workers.kill(worker, command.reason)

    def _stop_workers(self, command: cmd.StopWorkers) -> None:
        self.workers.stop(command.signum if command.signum is not None else self._config.shutdown_signal)

    def _open_epoch(self, command: cmd.OpenEpoch) -> None:
        if not self.workers:  # every process is new
            self.workers.failures.forget()
        self._opened_epoch = command.epoch
        if self._store is not None:
            self._store.advance(command.epoch)
        if self._plain is not None:
            self._plain.epoch_opened(command.first)
        if self._sharing is not None:
            self._sharing.open(command.epoch, command.owners if self._config.rootless else (command.first,))

    def _fail_epoch(self, command: cmd.FailEpoch) -> None:
        from ...protocol import messages

        assert self._store is not None
        assert self.report is not None
        now_ns = time.monotonic_ns()
        self._store.cancel(command.epoch)
        listeners = of_this_node(self._store.published_listeners(command.epoch))
        if len(listeners) > messages.MAX_LISTENERS:
            self._console.log("gloo-listeners", told=messages.MAX_LISTENERS, left_out=len(listeners))
        self._send_all(messages.FaultNotice(command.epoch, command.cause.summary, listeners))
        fault_ns = self._fault_seen_ns.get(command.epoch, now_ns)
        self._tell(self.report.failed(command.epoch, command.cause, fault_ns, now_ns, self.workers.pids))

    def _start_epoch(self, command: cmd.StartEpoch) -> None:
        from ...protocol import messages

        assert self.report is not None
        assembled_ns = time.monotonic_ns()
        self._epoch = command.epoch
        for slot in command.slots:
            worker = self.workers.find(slot.local_rank, slot.incarnation)
            if worker is None:  # it has died, which the job is about to hear
                continue
            self.workers.take_rank(worker, slot.rank)
            environ = epoch_environment(self._config, slot, command.layout, command.epoch, self._store_address)
            plan = None if command.plan is None else command.plan.part_of(slot.rank)
            for message in messages.starting(command.epoch, environ, plan):
                self._send(worker, message)
        self.report.started(command.epoch, command.cause, command.plan, assembled_ns, time.monotonic_ns())
        self.workers.failures.forget()
        self._fault_seen_ns.clear()

    def _finish_epoch(self, command: cmd.FinishEpoch) -> None:
        from ...protocol import messages

        assert self.report is not None
        self._send_all(messages.Finish(command.epoch))
        self._tell(self.report.finished())

    def _tell_returned(self, command: cmd.TellReturned) -> None:
        from ...protocol import messages

        self._send_all(messages.Returned(command.epoch, command.returned, command.collectives))

    def _restart_processes(self, command: cmd.RestartProcesses) -> None:
        assert self.report is not None
        if self._plain is not None:
            self._plain.epoch_ended()
        self._console.log("restart", number=command.number, limit=command.limit, cause=command.cause.summary)
        self._tell(self.report.overtaken())
        self._tell(self.report.restarted(command.cause, self.workers.pids))

    # ---- what happens here ---------------------------------------------------------------------------------------

    def _on_exit(self, worker: Worker, exit_code: int) -> None:
        self._note_fault(self._epoch, time.monotonic_ns())
        self._on_event(ev.Exited(worker.rank, worker.incarnation, exit_code))

    def _on_hook_exit(self, exit_code: int) -> None:
        self._on_event(ev.HookEnded(exit_code))

    def _on_message(self, local_rank: int, incarnation: int, message: messages.WorkerMessage) -> None:
        from ...protocol import messages

        worker = self.workers.find(local_rank, incarnation)
        if worker is None:
            return
        assert self.report is not None
        rank = worker.rank
        match message:
            case messages.Attach():
                worker.attached = True
                self._on_event(ev.Attached(rank, incarnation, message.abort_timeout_s))
            case messages.Arrive():
                self.report.arrived(message, time.monotonic_ns())
                self._on_event(
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
                self._on_event(ev.Registered(rank, incarnation, message.epoch, message.shard))
            case messages.Fault():
                self._note_fault(message.epoch, message.caught_ns)
                self._on_event(
                    ev.Faulted(
                        rank,
                        incarnation,
                        message.epoch,
                        messages.shorten(message.summary, messages.MAX_SUMMARY),
                        self._tracebacks.keep(message.traceback),
                        message.consequence,
                        message.ends_job,
                    )
                )
            case messages.Stepped():
                assert self._store is not None
                self._on_event(ev.Stepped(rank, incarnation, message.epoch, message.step))
                last_write = self._store.last_write_ns(message.epoch)
                self._tell(self.report.stepped(rank, message, last_write))
            case messages.Holds():
                self._on_event(ev.Holds(rank, incarnation, message.epoch, message.step, message.digests))
            case messages.Completed():
                self._on_event(ev.Completed(rank, incarnation, message.epoch, message.left, message.collectives))
            case messages.Waits():
                self._on_event(ev.Waits(rank, incarnation, message.epoch, message.returned, message.waiting))

    def blame(self, event: object, error: Exception) -> bool:
        """An event could not be taken. If a worker here has said it, that costs the worker; False: nobody did."""
        if not isinstance(event, _SAID_BY_WORKERS):
            return False
        reason = f"{type(event).__name__}: {error!r}"
        self._console.log("bad-message", peer=f"rank {event.rank}", reason=reason)
        for worker in self.workers:
            if worker.rank == event.rank and worker.incarnation == event.incarnation and worker.child is not None:
                self.workers.kill(worker, "it says what cannot be")
        return True

    def _note_fault(self, epoch: int, at_ns: int) -> None:
        self._fault_seen_ns[epoch] = min(at_ns, self._fault_seen_ns.get(epoch, at_ns))

    # ---- small things --------------------------------------------------------------------------------------------

    def _problem(self) -> str:
        """What a health check is told; nothing while this agent does all it should."""
        return "" if self._timers is None or self._timers.alive() else "nobody watches the timers of workers any more"

    @property
    def _alone(self) -> cmd.Layout:
        workers = self._config.nproc_per_node
        return cmd.Layout(workers, 1, 0, workers, 0, workers)

    @property
    def _store_address(self) -> tuple[str, int]:
        """What the variables name for workers: their own node's store, or the first node's."""
        return self._own_store if self._plain is None else self._plain.address or self._own_store

    @property
    def _own_store(self) -> tuple[str, int]:
        return self._config.rendezvous.host, self._listeners[0].getsockname()[1]

    @property
    def _endpoint(self) -> str:
        return f"ipc://{self._runtime}/agent.sock"

    def _send_all(self, message: messages.AgentMessage) -> None:
        for worker in self.workers:
            if worker.attached:
                self._send(worker, message)

    def _send(self, worker: Worker, message: messages.AgentMessage) -> None:
        from ...protocol.messages import MessageError

        assert self._channel is not None
        try:
            self._channel.send(worker.local_rank, worker.incarnation, message)
        except MessageError as error:  # it would wait for it in vain
            self._console.log("message-too-large", rank=worker.rank, reason=error, action="the process is replaced")
            self.workers.kill(worker, "it cannot be told what the others are told")

    def _log_store(self, line: str) -> None:
        self._console.log("store", message=line)

    def _tell(self, recovery: Recovery | None) -> None:
        """A recovery is over: a line for people, a row for programs."""
        if recovery is None:
            return
        from ..output.recovery_report import line

        self._console.log("recovery", **line(recovery))

        def write() -> None:
            try:
                with self.logs.recoveries.open("ab") as file:
                    file.write(recovery.as_json())
            except OSError as error:  # a full disk must not end a job that has just recovered
                self._console.log("recovery-not-written", path=self.logs.recoveries, reason=error.strerror)

        self.logs.disk.begin(write)
