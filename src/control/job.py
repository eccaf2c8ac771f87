"""The job's state machine. Theory of operation:

A job is one slot per rank (`state.Slot`) and one phase (`state.Phase`). `Job.handle(event, now)` looks the pair
(phase, event type) up in TRANSITIONS, and the method found there changes the slots and the phase and returns the
commands that the shell must execute. A pair that is not in the table, an event of a process that is no longer the one
in its slot, and an event of another epoch change nothing: they are counted in `Job.dropped`. Everything that affects
a transition lives in this file.

    PREPARING -> ASSEMBLING -> RUNNING -> ASSEMBLING ... -> CONCLUDING -> ENDED
                     |            | ^
                     |      fault v | all ranks at the barrier
                     |         RECOVERING
                     v            v
                  RESTARTING (every process anew) or STOPPING (give up) -> ENDED

An epoch starts when every rank waits at the barrier, and fails with the first fault in it. Scopes escalate: in
process (survivors keep their process, a lost rank alone is respawned), then process (all are started anew, bounded by
`max_restarts`), then the end. A process that never enters a wrapped function is treated as torchrun would.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from ..protocol.plan import RestorePlan
from . import events as ev
from .commands import (
    Cause,
    Command,
    End,
    FailEpoch,
    FinishEpoch,
    Kill,
    OpenEpoch,
    RestartProcesses,
    RunHook,
    Spawn,
    StartEpoch,
    StopWorkers,
)
from .plan import Report, make_plan
from .state import JobConfig, Phase, Slot, SlotState

EXIT_OK = 0
EXIT_FAILED = 1
"""A worker failed: the job may succeed when it is tried again."""
EXIT_STALLED = 93
"""The job fails again and again without progress: do not try it again unchanged."""
EXIT_SIGNAL_BASE = 128


class Job:
    """The decisions for one job. Not thread-safe: one shell drives it, one event after the other."""

    def __init__(self, config: JobConfig) -> None:
        self.config = config
        self.phase = Phase.PREPARING
        self.slots = [Slot(rank) for rank in range(config.world_size)]
        self.epoch = -1
        """The epoch that runs or ran last."""
        self.next_epoch = 0
        self.restarts = 0
        self.inprocess_restarts = 0
        self.finished_calls = 0
        self.dropped: Counter[str] = Counter()
        self._incarnations = 0
        self._hook_running = False
        self._spawn_epoch = 0
        self._stepped: set[int] = set()
        self._cause: Cause | None = None
        """Why the recovery under way is under way."""
        self._stalled: list[Cause] = []
        """The causes of the faults in a row without progress; the first is the one to show."""
        self._slowest_start = 0.0
        self._outcome: End | None = None
        self._due: float | None = None
        """When the stopping of all processes must be over."""
        self._killing = False

    def handle(self, event: ev.Event, now: float) -> list[Command]:
        """What must be done because of `event`. `now` is monotonic, in seconds."""
        transition = TRANSITIONS.get((self.phase, type(event)))
        if transition is None or self._is_stale(event):
            self.dropped[type(event).__name__] += 1
            return []
        return transition(self, event, now)

    def next_deadline(self) -> float | None:
        """When `handle` wants a TimePassed event; None for never."""
        dues = [slot.due for slot in self.slots if slot.due is not None]
        if self._due is not None:
            dues.append(self._due)
        return min(dues, default=None)

    def _is_stale(self, event: ev.Event) -> bool:
        """Of an earlier process of the rank, or of another epoch than the one its slot is in."""
        if not isinstance(event, ev.WorkerEvent):
            return False
        if not 0 <= event.rank < len(self.slots):
            return True
        slot = self.slots[event.rank]
        if event.incarnation != slot.incarnation or slot.gone:
            return True
        if isinstance(event, ev.Arrived):
            return event.epoch != slot.epoch or slot.state is SlotState.WAITING
        if isinstance(event, ev.Faulted | ev.Stepped | ev.Completed):
            return event.epoch != self.epoch or slot.epoch != self.epoch
        return False

    # ---- start ---------------------------------------------------------------------------------------------------

    def _begin(self, event: ev.Begin, now: float) -> list[Command]:
        if self.config.pre_train:
            self._hook_running = True
            return [RunHook("pre")]
        return self._launch(now)

    def _prepared(self, event: ev.HookEnded, now: float) -> list[Command]:
        self._hook_running = False
        if event.exit_code == 0:
            return self._launch(now)
        summary = f"the pre-train script {describe_exit(event.exit_code)}"
        return self._fail(Cause("hook", None, summary, exit_code=event.exit_code), EXIT_FAILED, now)

    def _launch(self, now: float) -> list[Command]:
        """Every rank gets a new process."""
        self.phase = Phase.ASSEMBLING
        self._spawn_epoch = self.next_epoch
        commands: list[Command] = [OpenEpoch(self.next_epoch)]
        return commands + [self._spawn(slot, now) for slot in self.slots]

    def _spawn(self, slot: Slot, now: float) -> Spawn:
        slot.occupy(self._incarnations, now)
        self._incarnations += 1
        return Spawn(slot.rank, slot.incarnation, self.next_epoch)

    # ---- the barrier ---------------------------------------------------------------------------------------------

    def _attach(self, event: ev.Attached, now: float) -> list[Command]:
        slot = self.slots[event.rank]
        slot.attached = True
        slot.abort_timeout = event.abort_timeout
        return []

    def _arrive(self, event: ev.Arrived, now: float) -> list[Command]:
        slot = self.slots[event.rank]
        if slot.state is SlotState.STARTING:
            self._slowest_start = max(self._slowest_start, now - slot.spawned_at)
        slot.attached = True
        slot.state = SlotState.WAITING
        slot.call, slot.step, slot.healthy = event.call, event.step, event.healthy
        slot.due = None
        if all(other.state is SlotState.WAITING for other in self.slots):
            return self._start_epoch(now)
        if self.phase is Phase.ASSEMBLING:
            for other in self.slots:
                if other.state in (SlotState.STARTING, SlotState.BETWEEN) and other.due is None:
                    other.due = now + self.config.start_timeout
            return self._check_reachable(now)
        return []

    def _check_reachable(self, now: float) -> list[Command]:
        """A rank that has ended for good will never come to a barrier at which others wait."""
        exited = [slot.rank for slot in self.slots if slot.state is SlotState.EXITED]
        waiting = [slot.rank for slot in self.slots if slot.state is SlotState.WAITING]
        if not (exited and waiting):
            return []
        summary = f"exited with code 0 while {name_ranks(waiting)} waits in front of a wrapped function"
        return self._fail(Cause("death", exited[0], summary, exit_code=0), EXIT_FAILED, now)

    def _start_epoch(self, now: float) -> list[Command]:
        calls = {slot.call for slot in self.slots}
        if len(calls) > 1:
            summary = f"the ranks stand in front of different wrapped functions ({sorted(calls)}, in order of calls)"
            return self._restart_processes(Cause("exception", None, summary), now)
        plan: RestorePlan | None = None
        if self.phase is Phase.RECOVERING:
            plan = make_plan({s.rank: Report(s.step, s.healthy, s.fresh) for s in self.slots})
        self.phase = Phase.RUNNING
        self.epoch = self.next_epoch
        self.next_epoch += 1
        self._stepped.clear()
        cause, self._cause = self._cause, None
        for slot in self.slots:
            slot.state = SlotState.RUNNING
            slot.epoch = self.epoch
        return [OpenEpoch(self.epoch), StartEpoch(self.epoch, plan, cause)]

    # ---- an epoch runs -------------------------------------------------------------------------------------------

    def _step(self, event: ev.Stepped, now: float) -> list[Command]:
        self._stepped.add(event.rank)
        self._stalled.clear()
        return []

    def _complete(self, event: ev.Completed, now: float) -> list[Command]:
        self.slots[event.rank].state = SlotState.COMPLETED
        if any(slot.state is not SlotState.COMPLETED for slot in self.slots):
            return []
        self.phase = Phase.ASSEMBLING
        self.finished_calls += 1
        self._stalled.clear()
        for slot in self.slots:
            slot.state = SlotState.BETWEEN
        return [FinishEpoch(self.epoch)]

    def _fault(self, event: ev.Faulted, now: float) -> list[Command]:
        cause = Cause(
            "exception", event.rank, event.summary, event.traceback, consequence=event.consequence
        )
        return self._recover(cause, now)

    def _death(self, event: ev.Exited, now: float) -> list[Command]:
        """A process is gone in the middle of an epoch; exit code 0 is no better, it has not completed."""
        slot = self.slots[event.rank]
        cause = self._cause_of_exit(slot, event.exit_code)
        slot.state = SlotState.LOST
        slot.due = None
        if self.finished_calls:
            return self._restart_processes(self._cannot_respawn(cause), now)
        commands = self._recover(cause, now)
        return commands + self._respawn_lost(now)

    def _recover(self, cause: Cause, now: float) -> list[Command]:
        """The epoch has failed: everybody to the barrier, unless a budget is used up."""
        self._cause = cause
        ended = self._charge(cause, now)
        if ended is not None:
            return ended
        self.phase = Phase.RECOVERING
        for slot in self.slots:
            if slot.state in (SlotState.RUNNING, SlotState.COMPLETED):
                slot.state = SlotState.UNWINDING
                slot.due = now + min(self.config.barrier_timeout, slot.abort_timeout or float("inf"))
        return [FailEpoch(self.epoch, cause)]

    def _charge(self, cause: Cause, now: float) -> list[Command] | None:
        """Counts one in-process restart against its budgets; commands when one is used up."""
        self.inprocess_restarts += 1
        self._stalled.append(cause)
        if len(self._stalled) >= self.config.stall_limit:
            return self._fail(self._stalled[0], EXIT_STALLED, now)
        limit = self.config.max_inprocess_restarts
        if limit is not None and self.inprocess_restarts > limit:
            return self._restart_processes(cause, now)
        return None

    # ---- recovery ------------------------------------------------------------------------------------------------

    def _further_fault(self, event: ev.Faulted, now: float) -> list[Command]:
        self._blame(
            Cause("exception", event.rank, event.summary, event.traceback, consequence=event.consequence)
        )
        return []

    def _further_death(self, event: ev.Exited, now: float) -> list[Command]:
        """A survivor that dies on its way is part of the same fault; a new process that dies is one more."""
        slot = self.slots[event.rank]
        cause = self._cause_of_exit(slot, event.exit_code)
        fresh = slot.fresh
        slot.state = SlotState.LOST
        slot.due = None
        if self.finished_calls:
            return self._restart_processes(self._cannot_respawn(cause), now)
        if fresh:
            self.next_epoch += 1
            ended = self._charge(cause, now)
            if ended is not None:
                return ended
        else:
            self._blame(cause)
        return self._respawn_lost(now)

    def _blame(self, cause: Cause) -> None:
        """A broken connection is the consequence of a fault whose own news can come later than it."""
        if self._cause is not None and self._cause.consequence and not cause.consequence:
            if self._stalled and self._stalled[-1] is self._cause:
                self._stalled[-1] = cause
            self._cause = cause

    def _respawn_lost(self, now: float) -> list[Command]:
        if self.phase not in (Phase.RECOVERING, Phase.ASSEMBLING):
            return []
        commands: list[Command] = []
        for slot in self.slots:
            if slot.state is SlotState.LOST:
                commands.append(self._spawn(slot, now))
                slot.due = now + self.config.barrier_timeout + self._slowest_start
        return commands

    def _overdue(self, event: ev.TimePassed, now: float) -> list[Command]:
        commands: list[Command] = []
        for slot in self.slots:
            if slot.due is None or slot.due > now:
                continue
            if slot.overdue:
                summary = f"{slot.overdue} and could not be killed"
                return self._fail(Cause("overdue", slot.rank, summary), EXIT_FAILED, now)
            slot.overdue = f"did not reach the barrier in time (it was {slot.state.value})"
            slot.due = now + self.config.shutdown_timeout
            commands.append(Kill(slot.rank, slot.incarnation, slot.overdue))
        return commands

    # ---- processes end outside an epoch --------------------------------------------------------------------------

    def _exit_outside(self, event: ev.Exited, now: float) -> list[Command]:
        slot = self.slots[event.rank]
        at_barrier = slot.state is SlotState.WAITING
        slot.due = None
        if event.exit_code == 0 and not at_barrier:
            slot.state = SlotState.EXITED
            if all(other.state is SlotState.EXITED for other in self.slots):
                return self._conclude(now)
            return self._check_reachable(now)
        slot.state = SlotState.LOST
        cause = self._cause_of_exit(slot, event.exit_code)
        if not self.config.in_process or not any(other.attached for other in self.slots):
            return self._restart_processes(cause, now)
        if self.finished_calls:
            return self._restart_processes(self._cannot_respawn(cause), now)
        return self._charge(cause, now) or self._respawn_lost(now)

    def _conclude(self, now: float) -> list[Command]:
        if not self.config.post_train:
            self.phase = Phase.ENDED
            return [End(EXIT_OK, "every worker succeeded")]
        self.phase = Phase.CONCLUDING
        self._hook_running = True
        return [RunHook("post")]

    def _concluded(self, event: ev.HookEnded, now: float) -> list[Command]:
        self._hook_running = False
        self.phase = Phase.ENDED
        if event.exit_code == 0:
            return [End(EXIT_OK, "every worker succeeded")]
        summary = f"the post-train script {describe_exit(event.exit_code)}"
        return [End(EXIT_FAILED, summary, Cause("hook", None, summary, exit_code=event.exit_code))]

    # ---- all processes anew, or the end --------------------------------------------------------------------------

    def _restart_processes(self, cause: Cause, now: float) -> list[Command]:
        if self.restarts >= self.config.max_restarts:
            return self._fail(cause, EXIT_FAILED, now)
        self.restarts += 1
        self.phase = Phase.RESTARTING
        self._cause = None
        self.finished_calls = 0
        self._stalled.clear()
        self.next_epoch = max(self.next_epoch, self._spawn_epoch + 1)
        announcement = RestartProcesses(cause, self.restarts, self.config.max_restarts)
        return [announcement, *self._stop_all(None, now)]

    def _fail(self, cause: Cause, exit_code: int, now: float) -> list[Command]:
        where = f"rank {cause.rank} " if cause.rank is not None else ""
        return self._stop_with(End(exit_code, f"{where}{cause.summary}", cause), None, now)

    def _stop_requested(self, event: ev.StopRequested, now: float) -> list[Command]:
        summary = f"stopped by signal {event.signum}"
        outcome = End(EXIT_SIGNAL_BASE + event.signum, summary, Cause("signal", None, summary))
        return self._stop_with(outcome, event.signum, now)

    def _stop_again(self, event: ev.StopRequested, now: float) -> list[Command]:
        """While stopping, a signal decides the exit code; the second one means at once."""
        if self._outcome is not None and self._outcome.exit_code <= EXIT_SIGNAL_BASE:
            return self._stop_requested(event, now)
        return self._kill_all(now)

    def _stop_with(self, outcome: End, signum: int | None, now: float) -> list[Command]:
        self.phase = Phase.STOPPING
        self._outcome = outcome
        return self._stop_all(signum, now)

    def _stop_all(self, signum: int | None, now: float) -> list[Command]:
        for slot in self.slots:
            slot.due = None
        if self._all_gone():
            return self._after_stop(now)
        self._killing = False
        self._due = now + self.config.shutdown_timeout
        return [StopWorkers(signum)]

    def _stopped(self, event: ev.Exited, now: float) -> list[Command]:
        slot = self.slots[event.rank]
        slot.state = SlotState.EXITED if event.exit_code == 0 else SlotState.LOST
        return self._after_stop(now) if self._all_gone() else []

    def _hook_stopped(self, event: ev.HookEnded, now: float) -> list[Command]:
        self._hook_running = False
        return self._after_stop(now) if self._all_gone() else []

    def _all_gone(self) -> bool:
        return not self._hook_running and all(slot.gone for slot in self.slots)

    def _after_stop(self, now: float) -> list[Command]:
        self._due = None
        if self.phase is Phase.STOPPING:
            assert self._outcome is not None
            self.phase = Phase.ENDED
            return [self._outcome]
        self.phase = Phase.PREPARING
        return self._begin(ev.Begin(), now)

    def _stop_overdue(self, event: ev.TimePassed, now: float) -> list[Command]:
        if self._due is None or self._due > now:
            return []
        if not self._killing:
            return self._kill_all(now)
        left = tuple(slot.rank for slot in self.slots if not slot.gone)
        self._due = None
        if self.phase is Phase.STOPPING and self._outcome is not None:
            outcome = self._outcome
        else:
            summary = f"{name_ranks(list(left))} could not be killed"
            outcome = End(EXIT_FAILED, summary, Cause("overdue", None, summary))
        self.phase = Phase.ENDED
        return [End(outcome.exit_code, outcome.reason, outcome.cause, left)]

    def _kill_all(self, now: float) -> list[Command]:
        self._killing = True
        self._due = now + self.config.shutdown_timeout
        return [StopWorkers(SIGKILL)]

    # ---- causes --------------------------------------------------------------------------------------------------

    def _cause_of_exit(self, slot: Slot, exit_code: int) -> Cause:
        if slot.overdue:
            return Cause("overdue", slot.rank, slot.overdue, exit_code=exit_code)
        return Cause("death", slot.rank, describe_exit(exit_code), exit_code=exit_code)

    def _cannot_respawn(self, cause: Cause) -> Cause:
        """A new process begins with the first wrapped function, and the others are past it."""
        why = f"{cause.summary}, after {self.finished_calls} wrapped function(s) had finished on every rank"
        return Cause(cause.kind, cause.rank, why, cause.traceback, cause.exit_code)


SIGKILL = 9


def describe_exit(exit_code: int) -> str:
    """`exited with code 3` or `was killed by signal 9`."""
    return f"was killed by signal {-exit_code}" if exit_code < 0 else f"exited with code {exit_code}"


def name_ranks(ranks: list[int]) -> str:
    """`rank 1` or `ranks 1, 2`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


Transition = Callable[[Job, Any, float], list[Command]]

TRANSITIONS: dict[tuple[Phase, type], Transition] = {
    (Phase.PREPARING, ev.Begin): Job._begin,
    (Phase.PREPARING, ev.HookEnded): Job._prepared,
    (Phase.PREPARING, ev.StopRequested): Job._stop_requested,
    #
    (Phase.ASSEMBLING, ev.Attached): Job._attach,
    (Phase.ASSEMBLING, ev.Arrived): Job._arrive,
    (Phase.ASSEMBLING, ev.Exited): Job._exit_outside,
    (Phase.ASSEMBLING, ev.TimePassed): Job._overdue,
    (Phase.ASSEMBLING, ev.StopRequested): Job._stop_requested,
    #
    (Phase.RUNNING, ev.Stepped): Job._step,
    (Phase.RUNNING, ev.Completed): Job._complete,
    (Phase.RUNNING, ev.Faulted): Job._fault,
    (Phase.RUNNING, ev.Exited): Job._death,
    (Phase.RUNNING, ev.StopRequested): Job._stop_requested,
    #
    (Phase.RECOVERING, ev.Attached): Job._attach,
    (Phase.RECOVERING, ev.Arrived): Job._arrive,
    (Phase.RECOVERING, ev.Faulted): Job._further_fault,
    (Phase.RECOVERING, ev.Exited): Job._further_death,
    (Phase.RECOVERING, ev.TimePassed): Job._overdue,
    (Phase.RECOVERING, ev.StopRequested): Job._stop_requested,
    #
    (Phase.RESTARTING, ev.Exited): Job._stopped,
    (Phase.RESTARTING, ev.TimePassed): Job._stop_overdue,
    (Phase.RESTARTING, ev.StopRequested): Job._stop_requested,
    #
    (Phase.CONCLUDING, ev.HookEnded): Job._concluded,
    (Phase.CONCLUDING, ev.StopRequested): Job._stop_requested,
    #
    (Phase.STOPPING, ev.Exited): Job._stopped,
    (Phase.STOPPING, ev.HookEnded): Job._hook_stopped,
    (Phase.STOPPING, ev.TimePassed): Job._stop_overdue,
    (Phase.STOPPING, ev.StopRequested): Job._stop_again,
}
