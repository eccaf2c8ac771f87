"""The re-entry loop: barrier, epoch, and after a fault the way back to the barrier.

Runs on the main thread. User code is entered at one place, `_run_epoch`, which everything it can raise comes back to.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..protocol import messages
from ..protocol.plan import Holding
from ..protocol.text import printable
from .aborts.groups import release_process_groups
from .aborts.nccl import surviving_errors
from .call import HPCallWrapper
from .faults import describe, ends_job, format_traceback, is_consequence, name_of, parts_of, reason_of_exit, slot
from .finalize import Finalize
from .health import HealthCheck, HealthCheckError
from .interrupt import Interrupted
from .log import debug, log
from .monitor import AbortPolicy
from .session import Session
from .torch_modes import TorchModes

_UNBOUNDED_ABORT_S = 3600.0
_LATEST_NEWS_S = 1.0
"""How long a process that wants to end waits for the news that its epoch has failed, of which that is a consequence."""
_LATEST_ANSWER_S = 5.0
"""How long a process that wants to end because of an error waits for the agent to say that the epoch has failed."""
_LATEST_TEXT_S = 5.0
"""How long the news of an exception waits for its text."""


@dataclass(frozen=True)
class Hooks:
    """What the user wants done after every fault, in this order, before the process joins the next epoch."""

    policy: AbortPolicy
    finalize: Finalize | None
    checkpoint_manager: Any
    health_check: HealthCheck | None
    trace_file_path: str | None
    check_memory_status: bool


class ReentryLoop:
    """Runs one wrapped function to its completion on every rank."""

    def __init__(self, session: Session, hooks: Hooks) -> None:
        self._session = session
        self._hooks = hooks
        self._epoch = session.epoch
        self._unwound_ns = 0
        session.calls += 1
        self._call = session.calls

    def run(self, function: Callable[[HPCallWrapper], Any]) -> Any:
        """The function's value in the epoch in which it returned on every rank."""
        modes = TorchModes.now()
        begins = getattr(self._hooks.checkpoint_manager, "begins_call", None)
        if begins is not None:
            begins(self._call)
        with surviving_errors():
            while True:
                caller = self._assemble()
                self._session.leftovers.attempt_begins()
                self._session.inside = True
                try:
                    returned, value = self._run_epoch(function, caller)
                finally:
                    self._session.inside = False
                if returned and self._session.monitor.complete(self._epoch, self._left()):
                    break
                del value
                self._unwind(caller)
                if modes is not None:
                    modes.restore()
        if isinstance(value, SystemExit):
            raise value
        return value

    def _assemble(self) -> HPCallWrapper:
        session, monitor = self._session, self._session.monitor
        start = monitor.arrive(
            messages.Arrive(
                epoch=self._epoch,
                call=self._call,
                step=session.lock.steps,
                healthy=session.lock.is_healthy(),
                notified_ns=monitor.notified_ns,
                aborted_ns=monitor.aborted_ns,
                unwound_ns=self._unwound_ns,
                holding=self._holding(),
            ),
            self._hooks.policy,
        )
        self._epoch = start.epoch
        session.enter(start)
        caller = HPCallWrapper(session, start.epoch, start.plan)
        attach = getattr(self._hooks.checkpoint_manager, "attach", None)
        if attach is not None:
            attach(caller, self._call)
        return caller

    def _holding(self) -> Holding | None:
        """What the checkpoint manager can give; None without one."""
        holding = getattr(self._hooks.checkpoint_manager, "holding", None)
        self._session.managed = holding is not None
        return None if holding is None else holding()

    def _run_epoch(self, function: Callable[[HPCallWrapper], Any], caller: HPCallWrapper) -> tuple[bool, Any]:
        """(True, value), or (False, None) when the epoch has failed. Other exceptions end the process."""
        gate = self._session.gate
        try:
            try:
                gate.enter()
                return True, function(caller)
            finally:
                gate.leave()
        except BaseException as error:
            gate.leave()  # an interrupt may have come before the inner one was through
            caught_ns = time.monotonic_ns()
            reason = reason_of_exit(error) if not isinstance(error, Exception) else None
            if self._is_return(error, reason):
                return True, error.with_traceback(None)
            if not self._ends_epoch(error, reason):
                raise
            self._report(error if reason is None else reason, caught_ns)
            if reason is not None and not self._session.monitor.wait_faulted(self._epoch, _LATEST_ANSWER_S):
                raise  # the job is being stopped: no epoch follows
            self._session.lock.force_release()
            self._await_abort()
            _forget_frames(error)
        return False, None

    def _is_return(self, error: BaseException, reason: BaseException | None) -> bool:
        """Whether the function was left in good order: exit code 0, and not on account of another rank's fault."""
        in_good_order = isinstance(error, SystemExit) and not error.code and not self._failed()
        return in_good_order and (reason is None or not is_consequence(reason))

    def _left(self) -> str:
        """How the function left its loop before the end, if the checkpoint manager knows."""
        left = getattr(self._hooks.checkpoint_manager, "left", None)
        return "" if left is None else str(left())

    def _failed(self) -> bool:
        return self._session.monitor.faulted(self._epoch)

    def _ends_epoch(self, error: BaseException, reason: BaseException | None) -> bool:
        """Whether this is a fault to recover from: any error, and in a failed epoch any way of leaving at all.

        `except Exception: sys.exit(1)` is how many scripts meet an error, `reason`: theirs, or the broken connection
        that another rank's has left them with. An exit for no reason is meant, unless the epoch has failed; the news of
        that comes a moment after the broken connection.
        """
        if isinstance(error, Exception | Interrupted):
            return True
        if isinstance(error, KeyboardInterrupt | GeneratorExit):
            return False
        if reason is not None:
            return True
        return isinstance(error, SystemExit) and self._session.monitor.wait_faulted(self._epoch, _LATEST_NEWS_S)

    def _report(self, error: BaseException, caught_ns: int) -> None:
        """Tells the agent, unless it was the agent who told us."""
        if isinstance(error, Interrupted) or self._failed():
            return
        monitor, epoch = self._session.monitor, self._epoch

        def fault(description: str, trace: str, consequence: bool, final: bool) -> messages.Fault:
            return messages.Fault(epoch, messages.shorten(description, 500), trace, consequence, caught_ns, final)

        # Its text is made by the user's code, which may never come to an end.
        name = name_of(error)
        nameless = fault(printable(f"{name}, whose text takes longer than {_LATEST_TEXT_S:.0f} s"), "", False, False)
        anyway = threading.Timer(_LATEST_TEXT_S, monitor.send, [nameless])
        anyway.daemon = True
        anyway.start()
        try:
            told = fault(
                describe(error), messages.shorten(format_traceback(error)), is_consequence(error), ends_job(error)
            )
        finally:
            anyway.cancel()
        if not self._failed():
            monitor.send(told)

    def _await_abort(self) -> None:
        timeout = self._hooks.policy.timeout
        if not self._session.monitor.wait_aborted(self._epoch, timeout + 1.0):
            log("abort-overdue", epoch=self._epoch, timeout_s=timeout, action="exit")
            os._exit(1)  # nothing can be trusted in here any more; the agent replaces the process

    def _unwind(self, caller: HPCallWrapper) -> None:
        """User code is left and the communicators are broken: drop what belongs to the epoch, ask if we are fit."""
        session = self._session
        laps = _Laps()
        session.lock.force_release()
        self._await_abort()
        laps.end("abort")
        remains = release_process_groups()
        gc.collect()
        session.reaper.drop(remains)
        session.leftovers.attempt_failed()
        laps.end("forget")
        on_restart = getattr(self._hooks.checkpoint_manager, "on_restart", None)
        if on_restart is not None:
            on_restart(caller)
        if self._hooks.finalize is not None:
            self._hooks.finalize(caller)
        laps.end("finalize")
        if self._hooks.health_check is not None:
            try:
                self._hooks.health_check(caller)
            except HealthCheckError as error:
                log("unfit", epoch=self._epoch, reason=str(error), action="exit")
                _leave_device()
                raise
        laps.end("health")
        self._unwound_ns = time.monotonic_ns()
        debug("unwound", epoch=self._epoch, **laps.milliseconds)
        if self._hooks.check_memory_status:
            _log_memory(self._epoch)
        if self._hooks.trace_file_path:
            self._trace(self._hooks.trace_file_path)

    def _trace(self, path: str) -> None:
        monitor = self._session.monitor
        row = {
            "rank": int(os.environ["RANK"]),
            "pid": os.getpid(),
            "epoch": self._epoch,
            "notified_ns": monitor.notified_ns,
            "aborted_ns": monitor.aborted_ns,
            "unwound_ns": self._unwound_ns,
        }
        import json

        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")


class _Laps:
    """Where the time of an unwinding goes, for the log at level debug."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.milliseconds: dict[str, object] = {}

    def end(self, name: str) -> None:
        now = time.monotonic()
        self.milliseconds[f"{name}_ms"] = round((now - self._last) * 1e3, 1)
        self._last = now


def _leave_device() -> None:
    """Ends the process at once if it uses CUDA: an ordinary end waits, in destructors, for the device's work."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _forget_frames(error: BaseException) -> None:
    """Lets go of what user code held in its local variables: DDP wrappers, work handles, data loader iterators."""
    seen: set[int] = set()
    chain: list[BaseException | None] = [error]
    while chain:
        current = chain.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        chain += [slot(current, "__cause__"), slot(current, "__context__"), *parts_of(current)]
        trace = slot(current, "__traceback__")
        if trace is not None:
            traceback.clear_frames(trace)
            BaseException.__dict__["__traceback__"].__set__(current, None)


def _log_memory(epoch: int) -> None:
    import psutil

    fields: dict[str, object] = {"rss_mb": psutil.Process().memory_info().rss >> 20}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        fields["cuda_allocated_mb"] = torch.cuda.memory_allocated() >> 20
        fields["cuda_reserved_mb"] = torch.cuda.memory_reserved() >> 20
    log("memory", epoch=epoch, **fields)
