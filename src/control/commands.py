"""What the shell must do next, as values. The shell executes them in order and decides nothing."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from ..protocol.plan import RestorePlan

EXIT_OK = 0
EXIT_FAILED = 1
"""A worker failed: the job may succeed when it is tried again."""
EXIT_STALLED = 93
"""The job fails again and again without progress: do not try it again unchanged."""
EXIT_SIGNAL_BASE = 128
"""Plus the number of the signal that stopped the job."""


class Cause(msgspec.Struct, frozen=True):
    """Why something happened to the job. `exit_code`: of the process that ended, negative for a signal."""

    kind: str
    """`exception`, `death`, `overdue`, `mismatch` (the ranks run different code), `lost state`, `hook`, `signal`."""
    rank: int | None
    summary: str
    traceback: str = ""
    exit_code: int | None = None
    consequence: bool = False
    """Most likely not the cause itself but a broken connection; another rank's own news will tell more."""


class RunHook(msgspec.Struct, frozen=True):
    """Start the pre-train (`pre`) or post-train (`post`) script and report its end as HookEnded."""

    name: str
    epoch: int = 0
    """The epoch that its environment names."""


class Spawn(msgspec.Struct, frozen=True):
    """Start the process of a rank; its environment names `epoch`."""

    rank: int
    incarnation: int
    epoch: int


class Kill(msgspec.Struct, frozen=True):
    """SIGKILL one process and all it started, now."""

    rank: int
    incarnation: int
    reason: str


class StopWorkers(msgspec.Struct, frozen=True):
    """Send every live worker and hook this signal (None: the configured shutdown signal)."""

    signum: int | None


class OpenEpoch(msgspec.Struct, frozen=True):
    """The store serves this epoch from now on; keys of older ones are forgotten."""

    epoch: int


class FailEpoch(msgspec.Struct, frozen=True):
    """Cancel the epoch's blocked store waits and tell every live attached worker to come to the barrier.

    Every epoch fails at most once. One that never began can fail too: a process started for it has died.
    """

    epoch: int
    cause: Cause


class StartEpoch(msgspec.Struct, frozen=True):
    """Release every worker from the barrier into `epoch`. `cause`: of the recovery that this ends, if any."""

    epoch: int
    plan: RestorePlan | None
    cause: Cause | None = None


class FinishEpoch(msgspec.Struct, frozen=True):
    """Tell every worker that the wrapped function has returned everywhere."""

    epoch: int


class RestartProcesses(msgspec.Struct, frozen=True):
    """Information: every process is about to be stopped and started again (restart `number` of `limit`)."""

    cause: Cause
    number: int
    limit: int


class End(msgspec.Struct, frozen=True):
    """The job is over. `left_behind`: ranks whose process did not die when killed."""

    exit_code: int
    reason: str
    cause: Cause | None = None
    left_behind: tuple[int, ...] = ()


Command: TypeAlias = (
    RunHook | Spawn | Kill | StopWorkers | OpenEpoch | FailEpoch | StartEpoch | FinishEpoch | RestartProcesses | End
)
