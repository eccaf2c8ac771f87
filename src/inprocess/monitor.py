"""The monitor thread: listens to the agent while the main thread trains, and gets it out of user code on a fault.

One per process, for its life. On a FaultNotice for the current epoch it lets a critical section end, breaks the
communicators, lets a step that has begun to change things end if it can, and interrupts the main thread. The main
thread meets it in `arrive`, `complete` and `wait_aborted`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from dataclasses import dataclass

from ..protocol import messages
from ..protocol.plan import MAX_GROUPS, NO_EPOCH
from .aborts import nccl
from .aborts.abort import Abort, AbortState
from .aborts.gloo import GlooWait, answer_calls
from .aborts.unknown import PATIENCE_S, unknown_names
from .connection import AgentConnection
from .interrupt import InterruptGate
from .log import log
from .standstill import LOOK_EVERY_S, Standstill

_INSIST_EVERY_S = 0.05
"""The interrupt is sent again that often: one that came just before a blocking call is seen only after it."""
_FORCE_AFTER_S = 2.0
"""After that long user code is taken to have put the exception away."""
_WATCH_NCCL_EVERY_S = 1.0
"""torch's NCCL watchdog tells nobody what it has found, it can only be asked; what it looks for takes minutes."""


@dataclass(frozen=True)
class AbortPolicy:
    """How the communicators are broken. `timeout` in seconds."""

    abort: Abort
    timeout: float
    raise_first: bool = False
    """Interrupt the main thread before the abort instead of after it."""
    wait_for_section: bool = True


class Monitor:
    """Runs the conversation with the agent. Methods are for the main thread unless they say otherwise."""

    def __init__(self, connection: AgentConnection, gate: InterruptGate) -> None:
        self._connection = connection
        self._gate = gate
        self._changed = threading.Condition()
        self._epoch = NO_EPOCH
        self._start: messages.Start | None = None
        self._notice: messages.FaultNotice | None = None
        self._finished = NO_EPOCH
        self._failure: BaseException | None = None
        self._policy: AbortPolicy | None = None
        self._insist_at: float | None = None
        self._force_at = 0.0
        self._give_up_at = 0.0
        self._gloo_wait: GlooWait | None = None
        self._calls_answered = False
        self._abort_deadline = 0.0
        self._watch_at: float | None = None
        """When to ask NCCL's watchdogs next; None while no epoch runs."""
        self._returned: messages.Returned | None = None
        """The latest news of ranks that have returned from the function under way."""
        self._standstill: Standstill | None = None
        self._waits = False
        """What the agent has been told of it."""
        self._look_at: float | None = None
        self._closing = False
        self._transfers: list[messages.Transfers] = []
        """The beginning of a plan whose `Start` is about to come."""
        self.stale = 0
        """Messages of earlier epochs, which changed nothing."""
        self.notified_ns = 0
        self.aborted_ns = 0
        self._thread = threading.Thread(target=self._run, name="hyperpodrun-monitor", daemon=True)
        self._thread.start()

    # ---- main thread ---------------------------------------------------------------------------------------------

    def send(self, message: messages.WorkerMessage) -> None:
        self._connection.send(message)

    def arrive(self, message: messages.Arrive, policy: AbortPolicy) -> messages.Start:
        """Waits at the barrier for the next epoch."""
        with self._changed:
            self._start = None
            self._policy = policy
        self._gate.reset()
        self.send(message)
        with self._changed:
            self._changed.wait_for(lambda: self._start is not None or self._failure is not None)
            self._check()
            assert self._start is not None
            return self._start

    def complete(self, epoch: int, left: str = "") -> bool:
        """The function has returned here. True once it has everywhere; False when the epoch failed meanwhile.

        `left`: how the loop of training was left before its end, if it was."""
        begun = nccl.collectives()
        counts = begun if len(begun) <= MAX_GROUPS else {}
        self.send(messages.Completed(epoch, left[: messages.MAX_LEFT], counts))
        with self._changed:
            self._changed.wait_for(lambda: self._finished >= epoch or self.faulted(epoch) or self._failure is not None)
            self._check()
            return self._finished >= epoch

    def faulted(self, epoch: int) -> bool:
        """Whether the agent has said that the epoch failed. May be interrupted, and so takes no lock: one that an
        exception kept from being released would be what the monitor waits for at the next fault."""
        notice = self._notice
        return notice is not None and notice.epoch == epoch

    def wait_faulted(self, epoch: int, timeout: float) -> bool:
        """The same, after waiting up to `timeout` seconds for the news."""
        with self._changed:
            return self._changed.wait_for(lambda: self.faulted(epoch) or self._failure is not None, timeout)

    def wait_aborted(self, epoch: int, timeout: float) -> bool:
        """Waits until the communicators of the failed epoch are broken; False if that takes longer than `timeout`."""
        with self._changed:
            done = self._changed.wait_for(lambda: self.aborted_ns > 0 or self._failure is not None, timeout)
            self._check()
            self._insist_at = None
            return done

    def close(self) -> None:
        """Sends what is queued and ends the thread."""
        self._closing = True
        self._connection.wake()
        self._thread.join(2.0)

    def _check(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"the connection to the agent has failed: {self._failure}") from self._failure

    # ---- monitor thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                for message in self._connection.exchange(self._patience()):
                    self._receive(message)
                now = time.monotonic()
                if self._insist_at is not None and now >= self._insist_at:
                    self._insist(now)
                if self._watch_at is not None and now >= self._watch_at:
                    self._watch_nccl(now)
                if self._look_at is not None and now >= self._look_at:
                    self._look(now)
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()
            log("monitor-failed", error=repr(error))
        finally:
            self._connection.close()

    def _patience(self) -> float | None:
        """Seconds until there is something to do although no message comes."""
        due = [at for at in (self._insist_at, self._watch_at, self._look_at) if at is not None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _insist(self, now: float) -> None:
        """The main thread has been asked to leave user code and has not come yet."""
        with self._changed:
            if self._insist_at is None:  # it has come this very moment
                return
            self._insist_at = now + _INSIST_EVERY_S
            notice = self._notice
        assert notice is not None
        self._abort(notice, again=True)
        if self._gloo_wait is not None and self._gloo_wait.is_endless():
            self._end_gloo_wait(notice)
        if now >= self._give_up_at:
            strange = unknown_names()
            if strange:
                log("backend-stuck", epoch=self._epoch, name=",".join(sorted(strange)), action="exit")
                os._exit(1)  # the agent replaces the process
        force = now >= self._force_at
        if force:
            self._force_at = now + _FORCE_AFTER_S
        self._gate.insist(force=force)

    def _end_gloo_wait(self, notice: messages.FaultNotice) -> None:
        """Either for a rank that was to connect, or for a message that gloo has lost."""
        if self._calls_answered or not answer_calls(frozenset(notice.gloo_listeners), int(os.environ["WORLD_SIZE"])):
            log("gloo-stuck", epoch=self._epoch, action="exit")
            os._exit(1)  # the agent replaces the process
        self._calls_answered = True
        self._gloo_wait = GlooWait()

    def _watch_nccl(self, now: float) -> None:
        """A collective that is overdue is a fault: the main thread waits for it and cannot say so itself."""
        self._watch_at = now + _WATCH_NCCL_EVERY_S
        found = nccl.errors()
        if not found:
            return
        self._watch_at = None
        timed_out = any("(TIMEOUT)" in sentence for sentence in found)
        self._connection.send(
            messages.Fault(
                self._epoch,
                messages.shorten("; ".join(found), 500),
                messages.shorten(_main_thread_stack()),
                not timed_out,  # whoever kept the others waiting will not tell; whoever broke a connection will
                time.monotonic_ns(),
            )
        )

    def _look(self, now: float) -> None:
        """Others have returned from the function: does the main thread wait for one of them?"""
        self._look_at = now + LOOK_EVERY_S
        assert self._returned is not None
        assert self._standstill is not None
        waits = self._standstill.waits()
        if waits != self._waits:
            self._waits = waits
            self._connection.send(messages.Waits(self._epoch, self._returned.returned, waits))

    def _receive(self, message: messages.AgentMessage) -> None:
        match message:
            case messages.Transfers():
                self._transfers.append(message)
            case messages.Start():
                parts, self._transfers = self._transfers, []
                with self._changed:
                    if message.epoch <= self._epoch:
                        self.stale += 1
                        return
                    message = messages.joined(parts, message)
                    self._epoch = message.epoch
                    self._notice = self._insist_at = self._look_at = None
                    self.notified_ns = self.aborted_ns = 0
                    self._start = message
                    self._watch_at = time.monotonic() + _WATCH_NCCL_EVERY_S if nccl.can_be_used() else None
                    self._changed.notify_all()
            case messages.Returned():
                if message.epoch != self._epoch or self._notice is not None or self._finished >= self._epoch:
                    self.stale += 1
                    return
                self._returned, self._waits = message, False
                self._standstill = Standstill(message.collectives)
                self._look_at = time.monotonic()
            case messages.Finish():
                self._look_at = None
                with self._changed:
                    self._finished = max(self._finished, message.epoch)
                    self._changed.notify_all()
            case messages.FaultNotice():
                if message.epoch != self._epoch or self._notice is not None:
                    self.stale += 1
                    return
                self._on_fault(message)

    def _on_fault(self, notice: messages.FaultNotice) -> None:
        with self._changed:
            self._notice = notice
            self.notified_ns = time.monotonic_ns()
            policy = self._policy
            self._watch_at = self._look_at = None
            self._changed.notify_all()
        assert policy is not None  # there is no epoch without an arrival
        self._abort_deadline = time.monotonic() + policy.timeout
        if policy.wait_for_section:
            self._gate.wait_for_section(policy.timeout)
        if policy.raise_first:
            self._gate.request()
        self._abort(notice)
        if self._gate.pass_open:
            self._gate.wait_for_pass(policy.timeout)
            self._abort(notice, again=True)
        with self._changed:
            self.aborted_ns = time.monotonic_ns()
            self._insist_at = time.monotonic() + _INSIST_EVERY_S
            self._force_at = time.monotonic() + _FORCE_AFTER_S
            self._give_up_at = time.monotonic() + PATIENCE_S
            self._gloo_wait = GlooWait()
            self._calls_answered = False
            self._gate.request()  # while the main thread cannot be on its way to the next epoch, where it would hold
            self._changed.notify_all()

    def _abort(self, notice: messages.FaultNotice, *, again: bool = False) -> None:
        assert self._policy is not None
        abort = self._policy.abort.again if again else self._policy.abort
        limit = max(0.0, self._abort_deadline - time.monotonic())
        state = AbortState(notice.epoch, frozenset(notice.gloo_listeners), limit, self._gate.pass_open)
        try:
            abort(state)
        except Exception as error:
            log("abort-failed", epoch=notice.epoch, error=repr(error))


def _main_thread_stack() -> str:
    """Where the main thread is, as a traceback shows it."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "" if frame is None else "".join(["Main thread, most recent call last:\n", *traceback.format_stack(frame)])
