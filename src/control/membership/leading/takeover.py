"""A new controller makes the job anew from what every node reports. Pure.

The controller's own knowledge is soft: what it cannot ask the nodes for (budgets, the outcome of a job that is being
stopped) travels with its commands as a `JobMemory`, and the newest one counts. Where an epoch runs undisturbed on
every rank it goes on. Otherwise it has failed, and the recovery begins, or begins again, with everybody who is left.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...job import causes
from ...job.barrier import expect_the_others, start_if_complete
from ...job.commands import Cause, Command, End, FailEpoch, FinishEpoch, Layout
from ...job.launch import conclude, start_processes
from ...job.places import Nodes, NodeState, Place
from ...job.recovery import begin_again_elsewhere, replace_all, replace_lost, replace_processes, start_recovery
from ...job.returning import expect_the_rest
from ...job.slots import Slot, Slots, SlotState
from ...job.state import JobConfig, JobState, Phase
from ...job.stopping import stop_again
from ..messages import JobMemory, LocalWorker, Report

_STATES = {
    "starting": SlotState.STARTING,
    "waiting": SlotState.WAITING,
    "running": SlotState.RUNNING,
    "completed": SlotState.COMPLETED,
    "unwinding": SlotState.UNWINDING,
    "between": SlotState.BETWEEN,
}


def remember(job: JobState, at: tuple[int, int], shards_at: tuple[int, int] = (0, 0)) -> JobMemory:
    """What the next controller will want to know. `shards_at`: when a rank has last told of another shard."""
    return JobMemory(
        at=at,
        phase=job.phase.value,
        next_epoch=job.next_epoch,
        incarnations=job.incarnations,
        restarts=job.restarts,
        inprocess_restarts=job.inprocess_restarts,
        finished_calls=job.finished_calls,
        progress=job.progress,
        slowest_start=job.slowest_start,
        wrapped=job.wrapped,
        stalled=tuple(job.stalled.items()),
        newest_step=job.newest_step,
        shards=job.shards.packed(),
        shards_at=shards_at,
        outcome=job.outcome,
    )


def was_begun(reports: Mapping[int, Report]) -> bool:
    """Whether there is a job to take over: some node has been told of it."""
    return any(report.memory.at != (0, 0) or report.epoch >= 0 for report in reports.values())


def rebuild(
    config: JobConfig, nodes: Mapping[int, NodeState], reports: Mapping[int, Report], cause: Cause, now: float
) -> tuple[JobState, list[Command]]:
    """The job, and what must be done at once. `nodes`: the members; `cause`: why there is a new controller."""
    memory = max((report.memory for report in reports.values()), key=lambda memory: memory.at)
    job = JobState(config, Slots(), nodes=Nodes(nodes))
    _recall(job, memory, reports)
    _take_slots(job, reports)
    return job, _go_on(job, memory, reports, cause, now)


def _recall(job: JobState, memory: JobMemory, reports: Mapping[int, Report]) -> None:
    seen = max((report.epoch for report in reports.values()), default=-1)
    used = [worker.incarnation for report in reports.values() for worker in report.workers]
    job.next_epoch = max(memory.next_epoch, seen + 1)
    job.incarnations = max([memory.incarnations, *(number + 1 for number in used)])
    job.restarts, job.inprocess_restarts = memory.restarts, memory.inprocess_restarts
    job.finished_calls, job.progress = memory.finished_calls, memory.progress
    job.slowest_start, job.wrapped = memory.slowest_start, memory.wrapped
    job.stalled = dict(memory.stalled)
    job.newest_step, job.outcome = memory.newest_step, memory.outcome
    known = max((report.memory for report in reports.values()), key=lambda memory: memory.shards_at)
    job.shards.learn(known.shards or ())
    for report in reports.values():
        for worker in report.workers:
            if worker.shard is not None:
                job.shards.tell(worker.rank, worker.shard)
    job.hooks = {node for node, report in reports.items() if report.hook}


def _take_slots(job: JobState, reports: Mapping[int, Report]) -> None:
    """Everybody where the newest layout has him; who has an older one and no place in it fills a hole."""
    placed = {node: report for node, report in reports.items() if report.layout is not None}
    layout = _newest_layout(placed)
    at: dict[int, int] = {}
    homeless: list[int] = []
    newest_first = sorted(placed, key=lambda node: placed[node].layout_at, reverse=True)
    for node in newest_first:
        wanted = placed[node].layout
        assert wanted is not None
        if wanted.node_rank < layout.nodes and wanted.node_rank not in at:
            at[wanted.node_rank] = node
        else:
            homeless.append(node)
    known = sum(job.nodes[node].workers for node in at.values())
    holes = [index for index in range(layout.nodes) if index not in at]
    width = max(1, (layout.world_size - known) // len(holes)) if holes else 0
    fitting = (node for node in homeless if job.nodes[node].workers == width)
    at.update(zip(holes, fitting, strict=False))
    for index in range(layout.nodes):
        holder = at.get(index)
        count = width if holder is None else job.nodes[holder].workers
        job.places.append(Place(holder, count, None if holder is None else job.nodes[holder].role))
        report = None if holder is None else reports[holder]
        by_local_rank = {} if report is None else {worker.local_rank: worker for worker in report.workers}
        for local_rank in range(count):
            slot = _slot(len(job.slots), local_rank, holder, by_local_rank.get(local_rank))
            slot.place = index
            if report is not None and local_rank in report.completed and slot.state is SlotState.LOST:
                slot.state = SlotState.EXITED
            job.slots.append(slot)


def _newest_layout(placed: Mapping[int, Report]) -> Layout:
    newest = max(placed.values(), key=lambda report: report.layout_at, default=None)
    return Layout(0, 0, 0, 0) if newest is None or newest.layout is None else newest.layout


def _slot(rank: int, local_rank: int, node: int | None, worker: LocalWorker | None) -> Slot:
    if worker is None:
        return Slot(rank, SlotState.LOST, node, local_rank)
    slot = Slot(
        rank,
        _STATES[worker.doing],
        node,
        local_rank,
        incarnation=worker.incarnation,
        spawn_epoch=worker.spawn_epoch,
        epoch=worker.epoch,
    )
    slot.abort_timeout = worker.abort_timeout
    if worker.rank != rank:
        slot.former_ranks = (worker.rank,)
    if worker.arrival is not None:
        arrival = worker.arrival
        slot.call, slot.step, slot.healthy = arrival.call, arrival.step, arrival.healthy
        slot.holding = arrival.holding
    return slot


def _go_on(job: JobState, memory: JobMemory, reports: Mapping[int, Report], cause: Cause, now: float) -> list[Command]:
    workers = [worker for report in reports.values() for worker in report.workers]
    job.epoch = max((slot.epoch for slot in job.slots), default=-1)
    job.progress = max([job.progress, *(worker.stepped for worker in workers)])
    job.wrapped |= any(worker.arrival is not None for worker in workers)
    match Phase(memory.phase):
        case Phase.STOPPING | Phase.ENDED if job.outcome is not None:
            job.phase = Phase.STOPPING
            return stop_again(job, now)
        case Phase.RESTARTING | Phase.GATHERING | Phase.PREPARING | Phase.NEW:
            job.phase = Phase.RESTARTING
            return stop_again(job, now)
        case Phase.CONCLUDING:
            job.phase = Phase.CONCLUDING
            return [] if job.hooks else [End(0, "every worker succeeded")]
    faults = [worker.fault for worker in workers if worker.fault is not None and worker.epoch == job.epoch]
    if faults:
        first = next((fault for fault in faults if not fault.consequence), None)
        if first is not None:
            cause = causes.of_error(first)
    states = {slot.state for slot in job.slots}
    if SlotState.BETWEEN in states and states <= {SlotState.BETWEEN, SlotState.COMPLETED}:
        return _finish_everywhere(job)
    if states == {SlotState.COMPLETED} and _all_in(job):
        return _finish_everywhere(job)
    if not faults and states <= {SlotState.RUNNING, SlotState.COMPLETED} and _all_in(job) and job.slots:
        job.phase = Phase.RUNNING
        if SlotState.COMPLETED in states:
            expect_the_rest(job, now)
        return []
    if states & {SlotState.RUNNING, SlotState.COMPLETED, SlotState.UNWINDING} or _mid_recovery(memory, job):
        return _recover(job, memory, cause, now)
    return _assemble(job, cause, now)


def _all_in(job: JobState) -> bool:
    return all(slot.epoch == job.epoch for slot in job.slots)


def _mid_recovery(memory: JobMemory, job: JobState) -> bool:
    return memory.phase in (Phase.RECOVERING.value, Phase.RUNNING.value) and job.epoch >= 0


def _finish_everywhere(job: JobState) -> list[Command]:
    """Some have heard that the function is over everywhere, or would have now."""
    if not any(slot.state is SlotState.BETWEEN for slot in job.slots):
        job.finished_calls += 1
    job.phase = Phase.ASSEMBLING
    job.stalled.clear()
    for slot in job.slots:
        if slot.state is SlotState.COMPLETED:
            slot.state = SlotState.BETWEEN
    job.slots.refile()
    return [FinishEpoch(job.epoch)]


def _recover(job: JobState, memory: JobMemory, cause: Cause, now: float) -> list[Command]:
    """The epoch has failed, if only because its controller was lost."""
    if job.slots.count(SlotState.LOST) and job.finished_calls:
        return replace_all(job, cause, now)
    if memory.phase == Phase.RUNNING.value:
        job.phase = Phase.RUNNING
        return start_recovery(job, cause, now)
    job.phase = Phase.RECOVERING
    job.fault = cause
    for slot in job.slots:
        if slot.state in (SlotState.RUNNING, SlotState.COMPLETED, SlotState.UNWINDING):
            slot.state = SlotState.UNWINDING
            slot.due = now + min(job.config.barrier_timeout, slot.abort_timeout or job.config.barrier_timeout)
        elif slot.state is SlotState.STARTING:
            slot.due = now + job.config.barrier_timeout + job.slowest_start
    job.slots.refile()
    commands: list[Command] = [FailEpoch(job.epoch, cause, job.next_epoch)]
    commands += replace_lost(job, now)
    return commands + start_if_complete(job, now)


def _assemble(job: JobState, cause: Cause, now: float) -> list[Command]:
    """No epoch has begun, or none since a function was over everywhere."""
    job.phase = Phase.ASSEMBLING
    lost = job.slots.ranks(SlotState.LOST)
    if lost:
        if not job.config.in_process or job.finished_calls:
            return replace_all(job, cause, now)
        if not job.wrapped:
            return begin_again_elsewhere(job, cause, now)
        return replace_processes(job, lost, cause, now) + expect_the_others(job, now)
    if not job.slots:
        return start_processes(job, now)
    if job.slots.all_are(SlotState.EXITED):
        return conclude(job)
    return start_if_complete(job, now) or expect_the_others(job, now)
