"""What the shell must do next, as values. The shell executes them in order and decides nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import msgspec

from ...protocol.plan import RestorePlan

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
    """`exception`, `death`, `overdue`, `hardware` (a GPU is in error), `mismatch` (the ranks run different code),
    `lost state`, `hook`, `signal`, `node` (one is lost) or `growth` (one has joined)."""
    rank: int | None
    summary: str
    traceback: str = ""
    exit_code: int | None = None
    consequence: bool = False
    """Most likely not the cause itself but a broken connection; another rank's own news will tell more."""


class LocalSlot(msgspec.Struct, frozen=True):
    """The process that holds a rank, as its node knows it."""

    rank: int
    local_rank: int
    incarnation: int


class Layout(msgspec.Struct, frozen=True):
    """A node's place in the world of an epoch."""

    world_size: int = 1
    nodes: int = 1
    node_rank: int = 0
    local_world_size: int = 1
    role_rank: int = 0
    """Of its first worker, among all workers of the same role."""
    role_world_size: int = 1


class RunHook(msgspec.Struct, frozen=True, tag=True):
    """Start the pre-train (`pre`) or post-train (`post`) script and report its end as HookEnded."""

    name: str
    epoch: int = 0
    """The epoch that its environment names."""
    layout: Layout = Layout()


class Spawn(msgspec.Struct, frozen=True, tag=True):
    """Start the process of a rank; its environment names `epoch`."""

    rank: int
    incarnation: int
    epoch: int
    node: int = 0
    local_rank: int = 0
    layout: Layout = Layout()


class Kill(msgspec.Struct, frozen=True, tag=True):
    """SIGKILL one process and all it started, now."""

    rank: int
    incarnation: int
    reason: str
    node: int = 0
    local_rank: int = 0


class StopWorkers(msgspec.Struct, frozen=True, tag=True):
    """Send every live worker and hook this signal (None: the configured shutdown signal)."""

    signum: int | None


class OpenEpoch(msgspec.Struct, frozen=True, tag=True):
    """The store serves this epoch from now on; keys of older ones are forgotten.

    `runs`: the nodes that share it, each run as its first number and its length. Every node is told of all.
    `first`: the node of rank 0, which alone has the keys where the job's store is not shared.
    """

    epoch: int
    runs: tuple[tuple[int, int], ...] = ((0, 1),)
    first: int = 0

    @property
    def owners(self) -> tuple[int, ...]:
        """The nodes that share it, ascending."""
        return tuple(number for first, length in self.runs for number in range(first, first + length))

    @staticmethod
    def runs_of(nodes: Iterable[int]) -> tuple[tuple[int, int], ...]:
        """Their numbers in a few bytes, however many there are."""
        runs: list[tuple[int, int]] = []
        for number in sorted(nodes):
            if runs and sum(runs[-1]) == number:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((number, 1))
        return tuple(runs)


class FailEpoch(msgspec.Struct, frozen=True, tag=True):
    """Cancel the epoch's blocked store waits and tell every live attached worker to come to the barrier.

    Every epoch fails at most once. One that never began can fail too: a process started for it has died.
    """

    epoch: int
    cause: Cause
    next_epoch: int = 0
    """The number of the next attempt: who confirms it will let no other controller use it."""


class StartEpoch(msgspec.Struct, frozen=True, tag=True):
    """Release every worker from the barrier into `epoch`. `cause`: of the recovery that this ends, if any.

    `slots` and `layout` are those of the node that it is addressed to: ranks can differ from the last epoch's.
    """

    epoch: int
    plan: RestorePlan | None
    cause: Cause | None = None
    slots: tuple[LocalSlot, ...] = ()
    layout: Layout = Layout()


class FinishEpoch(msgspec.Struct, frozen=True, tag=True):
    """Tell every worker that the wrapped function has returned everywhere."""

    epoch: int


class TellReturned(msgspec.Struct, frozen=True, tag=True):
    """Tell every worker that so many others have returned from the function: who still runs in it says when it waits
    for somebody. `collectives`: as in `Completed`, the fewest of all that have returned."""

    epoch: int
    returned: int
    collectives: dict[str, int] = msgspec.field(default_factory=dict)


class RestartProcesses(msgspec.Struct, frozen=True, tag=True):
    """Information: every process is about to be stopped and started again (restart `number` of `limit`)."""

    cause: Cause
    number: int
    limit: int


class End(msgspec.Struct, frozen=True, tag=True):
    """The job is over. `left_behind`: ranks whose process did not die when killed."""

    exit_code: int
    reason: str
    cause: Cause | None = None
    left_behind: tuple[int, ...] = ()


Command: TypeAlias = (
    RunHook
    | Spawn
    | Kill
    | StopWorkers
    | OpenEpoch
    | FailEpoch
    | StartEpoch
    | FinishEpoch
    | TellReturned
    | RestartProcesses
    | End
)
