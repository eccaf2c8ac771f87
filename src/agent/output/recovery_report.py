"""The recovery report: what each recovery was about and where its time went, phase by phase.

Pure: it is told what happened and when (`time.monotonic_ns()`, one clock for all processes of the host) and gives
records, a line and a table. A phase is the stretch of the critical path between the moments at which the last rank
passed two milestones, so that the phases of a recovery add up to its total.
"""

from __future__ import annotations

import msgspec

from ...control.job.commands import Cause
from ...protocol.messages import Arrive, Stepped
from ...protocol.plan import RestorePlan
from ...protocol.text import printable

PHASES = ("detect", "notify", "abort", "unwind", "start", "barrier", "assign", "bootstrap", "restore", "step")


class Recovery(msgspec.Struct):
    """One recovery. Times in milliseconds; a phase that was never reached is None."""

    number: int
    run_id: str
    failed_epoch: int
    epoch: int | None
    cause: str
    rank: int | None
    scope: str
    """`in-process`: every process lives on; `respawn`: ranks got a new process; `process`: all of them did."""
    respawned: list[int]
    pids_before: dict[int, int]
    pids_after: dict[int, int]
    phases_ms: dict[str, float | None]
    total_ms: float | None
    completed: bool
    """Every rank completed a step, or the function, in the new epoch before the next fault."""
    traceback: str = ""
    state: str | None = None
    """Where the state to go on from was: `memory`, `snapshot`, `disk`, or `start`."""
    step: int | None = None
    """The step that training goes on with: so many are completed in the state of the new epoch."""
    lost_steps: int = 0
    """Completed steps that have to be trained again."""

    def as_json(self) -> bytes:
        """One line of recoveries.jsonl."""
        return msgspec.json.encode(self) + b"\n"


class _Open(msgspec.Struct):
    """A recovery under way."""

    failed_epoch: int
    cause: Cause
    detected_ns: int
    fault_ns: int
    pids_before: dict[int, int]
    pids_after: dict[int, int]
    respawned: set[int] = msgspec.field(default_factory=set)
    arrivals: list[Arrive] = msgspec.field(default_factory=list)
    started_ns: int = 0
    """When the last new process came to the barrier."""
    epoch: int | None = None
    plan: RestorePlan | None = None
    assembled_ns: int = 0
    assigned_ns: int = 0
    steps: dict[int, Stepped] = msgspec.field(default_factory=dict)
    last_store_write_ns: int = 0


class RecoveryReport:
    """Collects the milestones of recoveries as they are reported."""

    def __init__(self, run_id: str, world_size: int) -> None:
        self._run_id = run_id
        self._world_size = world_size
        self._open: _Open | None = None
        self.recoveries: list[Recovery] = []

    def failed(self, epoch: int, cause: Cause, fault_ns: int, now_ns: int, pids: dict[int, int]) -> Recovery | None:
        """An epoch has failed. A recovery that was not over is closed as it stands and returned."""
        unfinished = self._close(completed=False)
        self._open = _Open(epoch, cause, now_ns, min(fault_ns, now_ns), dict(pids), dict(pids))
        return unfinished

    def respawned(self, rank: int, pid: int) -> None:
        if self._open is not None:
            self._open.respawned.add(rank)
            self._open.pids_after[rank] = pid

    def arrived(self, message: Arrive, now_ns: int) -> None:
        """A process is at the barrier: one that was told of the fault, or a new one."""
        if self._open is None:
            return
        if message.notified_ns:
            self._open.arrivals.append(message)
        else:
            self._open.started_ns = now_ns

    def started(
        self, epoch: int, cause: Cause | None, plan: RestorePlan | None, assembled_ns: int, now_ns: int
    ) -> None:
        """`cause`: the fault as it is known now; the first news of it can have been a mere consequence."""
        if self._open is not None:
            self._open.epoch = epoch
            self._open.plan = plan
            self._open.cause = cause or self._open.cause
            self._open.assembled_ns, self._open.assigned_ns = assembled_ns, now_ns

    def stepped(self, rank: int, message: Stepped, last_store_write_ns: int | None) -> Recovery | None:
        """A rank completed its first step of the epoch; the recovery when it was the last one to do so."""
        current = self._open
        if current is None or current.epoch != message.epoch:
            return None
        current.steps[rank] = message
        current.last_store_write_ns = max(current.last_store_write_ns, last_store_write_ns or 0)
        return self._close(completed=True) if len(current.steps) == self._world_size else None

    def overtaken(self) -> Recovery | None:
        """Before `restarted`: the recovery of an earlier fault, if not every rank has told its first step yet."""
        if self._open is None or self._open.epoch is None:  # no epoch: it is the fault that `restarted` tells of
            return None
        return self._close(completed=False)

    def finished(self) -> Recovery | None:
        """The wrapped function returned everywhere, or the job ended."""
        return self._close(completed=self._open is not None and self._open.epoch is not None)

    def restarted(self, cause: Cause, pids: dict[int, int]) -> Recovery:
        """Every process is started anew: there are no phases to tell apart."""
        self._open = None
        return self._add(
            failed_epoch=-1,
            epoch=None,
            cause=cause,
            scope="process",
            respawned=list(range(self._world_size)),
            pids_before=dict(pids),
            pids_after={},
            phases_ms=dict.fromkeys(PHASES),
            total_ms=None,
            completed=False,
        )

    def _close(self, *, completed: bool) -> Recovery | None:
        current, self._open = self._open, None
        if current is None:
            return None
        phases = _phases(current)
        reached = [value for value in phases.values() if value is not None]
        return self._add(
            failed_epoch=current.failed_epoch,
            epoch=current.epoch,
            cause=current.cause,
            scope="respawn" if current.respawned else "in-process",
            respawned=sorted(current.respawned),
            pids_before=current.pids_before,
            pids_after=current.pids_after,
            phases_ms=phases,
            total_ms=round(sum(reached), 3) if completed else None,
            completed=completed,
            state=current.plan.origin.value if current.plan is not None else None,
            step=current.plan.target_step if current.plan is not None else None,
            lost_steps=current.plan.lost_steps if current.plan is not None else 0,
        )

    def _add(self, *, cause: Cause, **fields: object) -> Recovery:
        recovery = Recovery(
            number=len(self.recoveries) + 1,
            run_id=self._run_id,
            cause=cause.summary,
            rank=cause.rank,
            traceback=cause.traceback,
            **fields,  # type: ignore[arg-type]
        )
        self.recoveries.append(recovery)
        return recovery


def _phases(current: _Open) -> dict[str, float | None]:
    """The critical path: for each milestone, when the last rank passed it."""
    arrivals, steps = current.arrivals, list(current.steps.values())
    began = max((step.restore_begin_ns for step in steps), default=0)
    milestones = {
        "detect": current.detected_ns,
        "notify": max((arrival.notified_ns for arrival in arrivals), default=0),
        "abort": max((arrival.aborted_ns for arrival in arrivals), default=0),
        "unwind": max((arrival.unwound_ns for arrival in arrivals), default=0),
        "start": current.started_ns if current.respawned else 0,
        "barrier": current.assembled_ns,
        "assign": current.assigned_ns,
        # Groups come up through the store: the last key written before the state moves is their end.
        "bootstrap": (began or current.last_store_write_ns) if steps else 0,
        "restore": max((step.restore_end_ns for step in steps), default=0),
        "step": max((step.stepped_ns for step in steps), default=0),
    }
    last_reached = max((i for i, name in enumerate(PHASES) if milestones[name]), default=0)
    phases: dict[str, float | None] = {}
    previous = current.fault_ns
    for i, name in enumerate(PHASES):
        if i > last_reached:
            phases[name] = None
            continue
        passed = max(previous, milestones[name])
        phases[name] = round((passed - previous) / 1e6, 3)
        previous = passed
    return phases


def line(recovery: Recovery) -> dict[str, object]:
    """The fields of the log line that follows a recovery."""
    return {
        "epoch": f"{recovery.failed_epoch}->{recovery.epoch}" if recovery.epoch is not None else None,
        "cause": recovery.cause,
        "rank": recovery.rank,
        "scope": recovery.scope,
        "respawned": ",".join(map(str, recovery.respawned)) or None,
        "step": recovery.step,
        "state": recovery.state if recovery.state not in (None, "memory") or recovery.lost_steps else None,
        "lost_steps": recovery.lost_steps or None,
        "total_ms": None if recovery.total_ms is None else f"{recovery.total_ms:.1f}",
        **{
            f"{name}_ms": f"{value:.1f}"
            for name, value in recovery.phases_ms.items()
            if value is not None and recovery.completed and (name != "start" or recovery.respawned)
        },
    }


def table(recoveries: list[Recovery]) -> str:
    """All recoveries of a job, for its end; columns that would say nothing are left out."""
    header = ["#", "epoch", "rank", "cause", "scope", "respawned", "at step", *PHASES, "total ms"]
    header.append("pids before -> after")
    rows = [header]
    for recovery in recoveries:
        times = [*recovery.phases_ms.values(), recovery.total_ms]
        rows.append(
            [
                str(recovery.number),
                f"{recovery.failed_epoch}->{recovery.epoch}" if recovery.epoch is not None else "-",
                "-" if recovery.rank is None else str(recovery.rank),
                _clip(printable(recovery.cause), 40),
                recovery.scope,
                ",".join(map(str, recovery.respawned)) or "-",
                "-" if recovery.step is None else str(recovery.step),
                *("-" if value is None else f"{value:.1f}" for value in times),
                _pids(recovery),
            ]
        )
    told = [index for index in range(len(header)) if any(row[index] != "-" for row in rows[1:])]
    rows = [[row[index] for index in told] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(told))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    noun = "recovery" if len(recoveries) == 1 else "recoveries"
    return "\n".join([f"{len(recoveries)} {noun}:", *(text.rstrip() for text in lines)]) + "\n"


def _pids(recovery: Recovery) -> str:
    if not recovery.pids_after:
        return "-"
    pairs = []
    for rank, before in sorted(recovery.pids_before.items()):
        after = recovery.pids_after[rank]
        pairs.append(f"{rank}:{before}" if before == after else f"{rank}:{before}->{after}")
    return " ".join(pairs)


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
