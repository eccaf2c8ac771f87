"""The barrier between epochs: who waits there, until when, and what happens when the last one has come.

Somebody who waits is never forgotten: as long as one rank waits, every other has a live process and a
deadline.
"""

from __future__ import annotations

from ...protocol.plan import Holding, RestorePlan
from . import causes
from . import events as ev
from .commands import Command, FinishEpoch, Kill, StartEpoch
from .launch import open_epoch, spawn
from .placement import can_grow, grow
from .plan import Impossible, Report, make_plan
from .slots import COMES_BY_ITSELF, Slot, SlotState
from .state import JobState, Phase
from .stopping import begin_again, fail, restart_processes


def attached(job: JobState, event: ev.Attached, now: float) -> list[Command]:
    job.wrapped = True
    job.slots[event.rank].abort_timeout = event.abort_timeout
    return []


def arrived(job: JobState, event: ev.Arrived, now: float) -> list[Command]:
    slot = job.slots[event.rank]
    if slot.state is SlotState.STARTING:
        job.slowest_start = max(job.slowest_start, now - slot.spawned_at)
    job.wrapped = True
    slot.call, slot.step, slot.healthy, slot.holding = event.call, event.step, event.healthy, event.holding
    expected = slot.due is not None
    job.slots.change(slot, state=SlotState.WAITING, due=None)
    if _complete(job):
        return start_if_complete(job, now)
    if job.phase is Phase.ASSEMBLING and not expected:  # else the others have their deadlines, too
        return expect_the_others(job, now)
    return []


def start_if_complete(job: JobState, now: float) -> list[Command]:
    """The next epoch, if everybody waits for it and a majority of the nodes knows its number."""
    if not _complete(job):
        return []
    if can_grow(job) and not job.finished_calls:
        return take_growth(job, now)
    if job.nodes.who_know(job.next_epoch) < job.quorum:
        return open_epoch(job)
    return _start_epoch(job, now)


def take_growth(job: JobState, now: float) -> list[Command]:
    """Whoever waits at the barrier waits for the new ranks, too."""
    commands: list[Command] = []
    for slot in grow(job):
        commands.append(spawn(job, slot.rank, now))
        if job.phase is Phase.RECOVERING:
            job.slots.change(job.slots[slot.rank], due=now + job.config.barrier_timeout + job.slowest_start)
    if job.phase is Phase.ASSEMBLING:
        commands += expect_the_others(job, now)
    return commands


def _complete(job: JobState) -> bool:
    return bool(job.slots) and job.slots.all_are(SlotState.WAITING)


def expect_the_others(job: JobState, now: float) -> list[Command]:
    """No fault has set deadlines: the first arrival does. A rank that has ended for good will never come."""
    job.dues_moved += 1
    slots = job.slots
    if not slots.count(SlotState.WAITING):
        for slot in slots.awaited():
            if slot.state in COMES_BY_ITSELF:
                slots.change(slot, due=None)
        return []
    if slots.count(SlotState.EXITED):
        ended, waiting = slots.ranks(SlotState.EXITED), slots.ranks(SlotState.WAITING)
        return restart_processes(job, causes.of_missing(ended[0], waiting), now)
    for rank in slots.without_deadline():
        slots.change(slots[rank], due=now + job.config.start_timeout)
    return []


def _start_epoch(job: JobState, now: float) -> list[Command]:
    calls = sorted({slot.call for slot in job.slots})
    if len(calls) > 1:
        return restart_processes(job, causes.of_different_calls(calls), now)
    plan = _plan(job)
    if isinstance(plan, Impossible):
        lost = causes.of_lost_state(job.fault, plan.reason)
        return begin_again(job, lost, now) if plan.from_start else restart_processes(job, lost, now)
    cause, job.fault = job.fault, None
    job.deserted |= job.after_return and cause is not None and cause.consequence
    job.after_return = False
    commands = open_epoch(job)
    job.phase = Phase.RUNNING
    job.epoch = job.next_epoch
    job.next_epoch += 1
    job.returned_due = None
    job.collectives.clear()
    for slot in job.slots:
        slot.state = SlotState.RUNNING
        slot.epoch = job.epoch
        slot.waits, slot.left = 0, ""
    job.slots.refile()
    return [*commands, StartEpoch(job.epoch, plan, cause)]


def _plan(job: JobState) -> RestorePlan | Impossible | None:
    """None where there is nothing to restore: no fault, and nothing kept from before all processes were started."""
    reports = {slot.rank: _report(slot) for slot in job.slots}
    kept = any(report.holding.snapshots or report.holding.disk is not None for report in reports.values())
    if job.phase is not Phase.RECOVERING and not kept:
        return None
    job.newest_step = max([job.newest_step, *(step for told in reports.values() for step in told.holding.steps)])
    return make_plan(reports, job.shards, job.newest_step)


def _report(slot: Slot) -> Report:
    """Without a CheckpointManager all ranks are taken to hold the same state, as in data parallel training."""
    if slot.holding is not None:
        return Report(slot.holding, managed=True, node=slot.place)
    whole = slot.healthy and not slot.fresh
    return Report(Holding(shard="", step=slot.step if whole else None), node=slot.place)


def registered(job: JobState, event: ev.Registered, now: float) -> list[Command]:
    job.shards.tell(event.rank, event.shard)
    return []


def finish_epoch(job: JobState) -> list[Command]:
    """The function has returned everywhere."""
    job.phase = Phase.ASSEMBLING
    job.finished_calls += 1
    job.newest_step = 0
    job.deserted = False
    job.digests.clear()
    job.stalled.clear()
    for slot in job.slots:
        slot.state = SlotState.BETWEEN
    job.slots.refile()
    return [FinishEpoch(job.epoch)]


def overdue(job: JobState, now: float) -> list[Command]:
    """Who is not at the barrier in time is killed, and replaced when it is gone."""
    late = job.slots.overdue(now)
    for slot in late:
        if slot.state is SlotState.KILLED:
            return fail(job, causes.of_unkillable(slot), now)
    return [kill(job, slot, f"did not reach the barrier in time (it was {slot.state.value})", now) for slot in late]


def kill(job: JobState, slot: Slot, reason: str, now: float) -> Command:
    """The process is to go; its rank is given to a new one when it is gone."""
    slot.killed_for = reason
    job.slots.change(slot, state=SlotState.KILLED, due=now + job.config.kill_timeout)
    return Kill(slot.rank, slot.incarnation, reason, slot.node or 0, slot.local_rank)
