"""Nodes come and go: what that means for the ranks, phase by phase.

A node that is lost is the death of all its ranks at once, for one reason. Its place is given to another only when a
majority has agreed that it is gone (`ev.NodesAgreed`): before that, a controller that is cut off from the others
could start a second process for a rank that runs elsewhere.

What a lost node costs, by phase:
- gathering, or a script before or after training runs: nothing; where ranks are missing, another node is waited for.
- processes start and nobody has come to the wrapped function: all start anew, at no cost (without in-process restarts
  nobody knows whether that is training already, and it costs one of `max_restarts`).
- in the function, or on the way back to it: one restart in process, with new processes for the lost ranks.
- between two functions, or in a later one: all start anew, which costs one of `max_restarts`.
- everything is being stopped: it is not waited for.
"""

from __future__ import annotations

from . import barrier, causes
from . import events as ev
from .barrier import expect_the_others, start_if_complete, take_growth
from .commands import EXIT_FAILED, Command, End
from .launch import open_again, start_processes
from .placement import can_grow, expect_nodes, fill_holes, forget_node, shrink
from .places import NodeState
from .recovery import begin_again_elsewhere, replace_all, replace_lost, replace_processes, start_recovery
from .state import JobState, Phase
from .stopping import fail, restart_processes


def lost(job: JobState, event: ev.NodeLost, now: float) -> list[Command]:
    """While processes run, in an epoch or outside of one."""
    gone = forget_node(job, event.node)
    if not gone:
        return []
    cause = causes.of_node(gone, event.reason)
    if job.finished_calls:
        return replace_all(job, cause, now)
    if job.phase is Phase.RUNNING:
        return start_recovery(job, cause, now)
    if job.phase is Phase.ASSEMBLING and not job.config.in_process:
        return replace_all(job, cause, now)
    if job.phase is Phase.ASSEMBLING and not job.wrapped:
        return begin_again_elsewhere(job, cause, now)
    commands = replace_processes(job, [slot.rank for slot in gone], cause, now)
    if job.phase is Phase.ASSEMBLING:
        commands += expect_the_others(job, now)
    return commands


def lost_while_gathering(job: JobState, event: ev.NodeLost, now: float) -> list[Command]:
    forget_node(job, event.node)
    expect_nodes(job, now)
    return []


def joined(job: JobState, event: ev.NodeJoined, now: float) -> list[Command]:
    _admit(job, event)
    return reconsider(job, now)


def agreed(job: JobState, event: ev.NodesAgreed, now: float) -> list[Command]:
    job.agreed, job.quorum = True, event.quorum
    return reconsider(job, now)


def noted(job: JobState, event: ev.NodeJoined | ev.NodesAgreed, now: float) -> list[Command]:
    """While nothing can be done about it."""
    if isinstance(event, ev.NodeJoined):
        _admit(job, event)
    else:
        job.agreed, job.quorum = True, event.quorum
    return []


def _admit(job: JobState, event: ev.NodeJoined) -> None:
    job.nodes.admit(event.node, NodeState(event.workers, event.role))
    job.next_epoch = max(job.next_epoch, event.epoch + 1)


def opened(job: JobState, event: ev.Opened, now: float) -> list[Command]:
    if event.node not in job.nodes:
        return []
    job.nodes.confirm(event.node, event.epoch)
    return start_if_complete(job, now) if job.phase in (Phase.ASSEMBLING, Phase.RECOVERING) else []


def reconsider(job: JobState, now: float) -> list[Command]:
    """There may be a node for a place now, or for a larger world."""
    if job.phase is Phase.GATHERING:
        return start_processes(job, now)
    if job.places.has_holes:
        fill_holes(job)
        commands = replace_lost(job, now)
        if job.phase is Phase.ASSEMBLING:
            commands += expect_the_others(job, now)
        return commands or start_if_complete(job, now)
    if job.phase is Phase.RUNNING and can_grow(job) and not job.finished_calls:
        cause = causes.of_growth(job)
        commands = start_recovery(job, cause, now, charged=False)
        return commands + take_growth(job, now)
    if job.phase is Phase.RECOVERING and can_grow(job):
        return take_growth(job, now)
    if job.phase is Phase.ASSEMBLING and can_grow(job) and not job.config.in_process:
        return restart_processes(job, causes.of_growth(job), now, charged=False)
    if job.phase in (Phase.ASSEMBLING, Phase.RECOVERING):
        return open_again(job) + start_if_complete(job, now)
    return []


def time_passed(job: JobState, event: ev.TimePassed, now: float) -> list[Command]:
    """Deadlines of processes first, then that of the place."""
    commands = barrier.overdue(job, now)
    return commands if job.phase is Phase.STOPPING else commands + overdue(job, now)


def overdue(job: JobState, now: float) -> list[Command]:
    """Nobody has taken the place of a lost node: a smaller world, or the end."""
    if job.hole_due is None or job.hole_due > now:
        return []
    if not job.agreed:
        job.hole_due = now + 1.0
        return []
    if not shrink(job):
        cause = causes.of_hole(job)
        if job.phase is Phase.GATHERING:
            job.phase = Phase.ENDED
            job.hole_due = None
            return [End(EXIT_FAILED, causes.describe(cause), cause)]
        return fail(job, cause, now)
    if job.phase is Phase.GATHERING:
        return start_processes(job, now)
    return start_if_complete(job, now)


def overdue_while_gathering(job: JobState, event: ev.TimePassed, now: float) -> list[Command]:
    return overdue(job, now)
