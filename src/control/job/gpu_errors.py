"""What an error that a GPU reports means for the processes on it and for its node.

The numbers are those of NVIDIA's catalogue of Xid errors. Most of them are a program's own doing, or a consequence of
its death, and the process learns of them by itself: those are only logged, as is any number that is not here.
"""

from __future__ import annotations

import enum


class Verdict(enum.Enum):
    """What is to be done."""

    LOG = "log"
    """The process finds out by itself, and its health check with it."""
    REPLACE = "replace the processes on it"
    """What the processes hold in the GPU's memory, or do on it, cannot be trusted; new ones can be."""
    LEAVE = "leave the job with its node"
    """The GPU needs a reset or a repair: new processes would fail as well."""


_MEANINGS: dict[int, tuple[Verdict, str]] = {
    13: (Verdict.LOG, "a kernel's error"),
    31: (Verdict.LOG, "a kernel's access to memory that is not its own"),
    43: (Verdict.LOG, "a kernel was stopped by its own error"),
    45: (Verdict.LOG, "the work of a process was cleared away after an error or its death"),
    48: (Verdict.REPLACE, "uncorrectable memory error"),
    61: (Verdict.LEAVE, "the GPU's microcontroller stopped"),
    62: (Verdict.LEAVE, "the GPU's microcontroller halted"),
    63: (Verdict.LOG, "a memory row is to be remapped at the next reset"),
    64: (Verdict.LEAVE, "a memory row could not be remapped"),
    74: (Verdict.LEAVE, "NVLink error"),
    79: (Verdict.LEAVE, "the GPU has fallen off the bus"),
    92: (Verdict.LOG, "many corrected memory errors"),
    94: (Verdict.REPLACE, "contained memory error"),
    95: (Verdict.LEAVE, "uncontained memory error"),
    109: (Verdict.REPLACE, "a context switch timed out"),
    119: (Verdict.LEAVE, "the GPU's system processor does not answer"),
    120: (Verdict.LEAVE, "the GPU's system processor failed"),
    140: (Verdict.LEAVE, "unrecovered memory error"),
}


def judge(xid: int) -> tuple[Verdict, str]:
    """The verdict, and in words what the GPU means."""
    return _MEANINGS.get(xid, (Verdict.LOG, "see NVIDIA's catalogue of Xid errors"))


def judge_rows(*, pending: bool, failed: bool) -> str | None:
    """In words what the state of the remapped memory rows asks of people; None: nothing."""
    if failed:
        return "a memory row could not be remapped: the GPU must be replaced"
    if pending:
        return "a memory row waits to be remapped: reset the GPU when it is free"
    return None
