"""Why something happened to the job, and how that is said: every `Cause` is made here."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from ...protocol.messages import MAX_SUMMARY, shorten
from ...protocol.text import last_frames, some
from . import events as ev
from .commands import Cause
from .slots import Slot, SlotState
from .state import JobState


def of_error(event: ev.Faulted) -> Cause:
    """User code raised."""
    summary, traceback = shorten(event.summary, MAX_SUMMARY), last_frames(event.traceback)  # they go to every node
    return Cause("exception", event.rank, summary, traceback, consequence=event.consequence)


def of_exit(slot: Slot, exit_code: int) -> Cause:
    """The process of a rank ended. To be asked before the slot is told so."""
    if slot.killed_for:
        return Cause("overdue", slot.rank, slot.killed_for, exit_code=exit_code)
    summary = describe_exit(exit_code)
    if exit_code == 0:
        waiting = slot.state is SlotState.WAITING
        summary += " at the barrier" if waiting else " before the wrapped function was over"
    return Cause("death", slot.rank, summary, exit_code=exit_code)


def of_condemned(event: ev.Condemned) -> Cause:
    """Its node has found the process unfit."""
    return Cause("hardware", event.rank, event.reason)


def of_missing(ended: int, waiting: Sequence[int]) -> Cause:
    """A rank has ended for good and others wait for it."""
    verb = "waits" if len(waiting) == 1 else "wait"
    summary = f"exited with code 0 while {name_ranks(waiting)} {verb} at the barrier"
    return Cause("mismatch", ended, summary, exit_code=0)


def of_return(returned: Sequence[Slot], waiting: Sequence[int]) -> Cause:
    """Ranks wait in torch.distributed for one that has returned from the wrapped function."""
    verb = "waits" if len(waiting) == 1 else "wait"
    first = _first_to_leave(returned)
    summary = (
        f"{_returned(first)} while {name_ranks(waiting)} {verb} for it in torch.distributed: all ranks must go through "
        "the same collectives, so they have to leave the loop at the same step"
    )
    return Cause("mismatch", first.rank, summary)


def describe_return(returned: Sequence[Slot]) -> str:
    """`rank 1 had returned from the wrapped function`."""
    first = _first_to_leave(returned)
    return f"rank {first.rank} had {_returned(first)}"


def _first_to_leave(returned: Sequence[Slot]) -> Slot:
    """Whoever left its loop early is to be named, if anybody did."""
    return next((slot for slot in returned if slot.left), returned[0])


def _returned(slot: Slot) -> str:
    return "returned from the wrapped function" + (f" ({slot.left})" if slot.left else "")


def of_different_replicas(one: int, other: int, group: str, step: int) -> Cause:
    """Ranks that are taken to hold the same state do not."""
    ranks = name_ranks(sorted((one, other)))
    of = f" of replica group '{group}'" if group else ""
    return Cause(
        "mismatch",
        None,
        f"{ranks}{of} hold different parameters or optimizer state under the same names after step {step}: they are no "
        "replicas of each other. If each holds a part of the model, say who holds the same, by "
        "CheckpointManager(replicas=lambda rank: ...); if they are to be the same, start them from the same weights",
    )


def of_different_calls(calls: Sequence[int]) -> Cause:
    """The ranks wait, but not for the same thing."""
    numbers = " and ".join(map(str, calls))
    return Cause("mismatch", None, f"the ranks wait for different wrapped functions, numbers {numbers}")


def of_unkillable(slot: Slot) -> Cause:
    """A process that was killed for being overdue is still there."""
    return Cause("overdue", slot.rank, f"{slot.killed_for} and could not be killed")


def of_left_behind(ranks: Sequence[int]) -> Cause:
    """The same, while all processes are stopped to be started anew."""
    return Cause("overdue", None, f"{name_ranks(ranks)} could not be killed")


def of_silent_arrival(rank: int) -> Cause:
    """A worker is back at the barrier and the news of its fault is not here, or not here yet."""
    return Cause("exception", rank, "an error that it has not reported", consequence=True)


def of_lost_state(fault: Cause | None, reason: str) -> Cause:
    """The fault took state with it that nobody else has."""
    if fault is None:
        return Cause("lost state", None, reason)
    return replace(fault, summary=f"{fault.summary}, and {reason}", consequence=False)


def of_node(lost: Sequence[Slot], reason: str) -> Cause:
    """A node is gone, and its ranks with it. To be asked when the slots are known to be lost."""
    ranks = [slot.rank for slot in lost]
    return Cause("node", None, f"{reason}, and {name_ranks(ranks)} with it")


def of_growth(job: JobState) -> Cause:
    """No fault: more nodes are there than the world has."""
    return Cause("growth", None, f"{len(job.spares())} node(s) joined a world of {len(job.places)}")


def of_hole(job: JobState) -> Cause:
    """Nobody has come to take a lost node's place."""
    left = job.places.held
    waited = f"no node took the place of the lost one within {job.config.join_timeout:g} s"
    return Cause("node", None, f"{waited}, and {left} node(s) are fewer than the {job.config.min_nodes} allowed")


def of_hook(name: str, exit_code: int) -> Cause:
    return Cause("hook", None, f"the {name}-train script {describe_exit(exit_code)}", exit_code=exit_code)


def of_signal(signum: int) -> Cause:
    return Cause("signal", None, f"stopped by signal {signum}")


def with_reason(cause: Cause, reason: str) -> Cause:
    """The same cause, and why it could not be dealt with."""
    return replace(cause, summary=f"{cause.summary}, {reason}")


def describe(cause: Cause) -> str:
    """A sentence: `rank 1 raised ValueError: boom`, `rank 2 was killed by signal 9`."""
    if cause.rank is None:
        return cause.summary
    verb = "raised " if cause.kind == "exception" else ""
    return f"rank {cause.rank} {verb}{cause.summary}"


def describe_exit(exit_code: int) -> str:
    """`exited with code 3` or `was killed by signal 9`."""
    return f"was killed by signal {-exit_code}" if exit_code < 0 else f"exited with code {exit_code}"


def name_ranks(ranks: Sequence[int]) -> str:
    """`rank 1` or `ranks 1, 2`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {some(ranks)}"
