"""A job's shell and workers in memory, and what must hold whatever happens to them.

`World` carries out the job's commands on workers that respond as real ones do; a test decides when they act,
what is delivered late, twice or never, and who dies. After every event the rules of the design are checked, from
what was told to the job and what it answered, not from how it came to it.
"""

from __future__ import annotations

import copy
import enum
from collections import deque
from dataclasses import dataclass, field

import msgspec
from filed import check_files
from hyperpodrun.control.job import commands as cmd
from hyperpodrun.control.job import events as ev
from hyperpodrun.control.job.job import Job
from hyperpodrun.control.job.slots import SlotState
from hyperpodrun.control.job.state import JobConfig, JobState, Phase
from hyperpodrun.protocol.plan import NO_EPOCH


class Doing(enum.Enum):
    """What a worker does, as it sees it."""

    STARTING = enum.auto()
    ATTACHED = enum.auto()
    WAITING = enum.auto()
    RUNNING = enum.auto()
    RETURNED = enum.auto()
    UNWINDING = enum.auto()
    BETWEEN = enum.auto()
    DEAD = enum.auto()


@dataclass
class Worker:
    """One process. `outbox` holds what it has said and nobody has heard yet."""

    rank: int
    incarnation: int
    spawn_epoch: int
    epoch: int = NO_EPOCH
    doing: Doing = Doing.STARTING
    call: int = 1
    step: int = 0
    stepped: bool = False
    killed: bool = False
    asked_to_stop: bool = False
    outbox: deque[ev.Event] = field(default_factory=deque)

    @property
    def alive(self) -> bool:
        return self.doing is not Doing.DEAD

    def act(self, *, healthy: bool = True, wrapped: bool = True, go_on: bool = True) -> None:
        """The next thing that a worker in good order does. `go_on`: to the next function, not to the end."""
        me = (self.rank, self.incarnation)
        match self.doing:
            case Doing.STARTING if wrapped:
                self.doing = Doing.ATTACHED
                self.outbox.append(ev.Attached(*me, None))
            case Doing.STARTING:
                self.die(0)
            case Doing.ATTACHED | Doing.UNWINDING:
                self._arrive(healthy)
            case Doing.RUNNING if not self.stepped:
                self.stepped = True
                self.step += 1
                self.outbox.append(ev.Stepped(*me, self.epoch, self.step))
            case Doing.RUNNING:
                self.doing = Doing.RETURNED
                self.outbox.append(ev.Completed(*me, self.epoch))
            case Doing.BETWEEN if go_on:
                self.call += 1
                self._arrive(healthy)
            case Doing.BETWEEN:
                self.die(0)

    def fault(self, *, consequence: bool) -> None:
        if self.doing is Doing.RUNNING:
            self.doing = Doing.UNWINDING
            summary = f"boom of {self.rank}.{self.incarnation} in {self.epoch}"
            self.outbox.append(ev.Faulted(self.rank, self.incarnation, self.epoch, summary, consequence=consequence))

    def die(self, exit_code: int) -> None:
        if self.alive:
            self.doing = Doing.DEAD
            self.outbox.append(ev.Exited(self.rank, self.incarnation, exit_code))

    def _arrive(self, healthy: bool) -> None:
        self.doing = Doing.WAITING
        self.outbox.append(ev.Arrived(self.rank, self.incarnation, self.epoch, self.call, self.step, healthy))


class World:
    """One job with its shell: the clock, the workers, and the record of everything."""

    def __init__(self, config: JobConfig) -> None:
        self.config = config
        self.job = Job(config)
        self.now = 0.0
        self.workers: dict[int, Worker] = {}
        self.former: list[Worker] = []
        """Processes that were replaced; their outboxes can still be delivered."""
        self.hook: str | None = None
        self.end: cmd.End | None = None
        self.delivered: list[ev.Event] = []
        """What workers have said and the job was told."""
        self.log: list[tuple[ev.Event, float]] = []
        self.answers: list[list[cmd.Command]] = []
        # What the rules are checked against:
        self.waiting: dict[int, ev.Arrived] = {}
        """The ranks whose live process has told that it waits."""
        self.gone: dict[int, int] = {}
        """The exit codes of the ranks whose last process is known to be gone."""
        self.opened: list[int] = []
        self.started: list[int] = []
        self.failed: list[int] = []
        self.spent: set[int] = set()
        """The epochs that processes were started for which are gone: they may have left keys there."""
        self.ran: set[int] = set()
        """The incarnations that have run in an epoch."""
        self.incarnations: list[int] = []
        self.restarts = 0
        self.signals: list[int] = []
        self.hook_failed = False

    # ---- what happens ----------------------------------------------------------------------------------

    def tell(self, event: ev.Event) -> list[cmd.Command]:
        """An event reaches the job; its commands are carried out and checked."""
        if isinstance(event, ev.StopRequested) and self.end is None:
            self.signals.append(event.signum)
        if isinstance(event, ev.HookEnded):
            self.hook = None
            self.hook_failed |= event.exit_code != 0
        self._hear(event)
        self.log.append((event, self.now))
        answer = self.job.handle(event, self.now)
        self.answers.append(answer)
        assert not (answer and self.end), f"commands after the end: {answer}"
        for command in answer:
            assert self.end is None, "a command after the end"
            self._carry_out(command)
        self._check_state()
        return answer

    def tell_stale(self, event: ev.Event) -> None:
        """An event that must change nothing."""
        before = copy.deepcopy(self.job.state)
        dropped = self.job.dropped.total()
        assert self.job.handle(event, self.now) == [], f"{event} is stale"
        assert same_but_for_drops(before, self.job.state), f"{event} is stale"
        assert self.job.dropped.total() == dropped + 1, "what is dropped is counted"
        self.log.append((event, self.now))
        self.answers.append([])

    def repeat(self, event: ev.Event) -> None:
        """An event that was told before and is told again, now or much later: nothing changes."""
        before = copy.deepcopy(self.job.state)
        assert self.job.handle(event, self.now) == [], f"{event} was told before"
        assert same_but_for_drops(before, self.job.state), f"{event} was told before"
        self.log.append((event, self.now))
        self.answers.append([])

    def deliver(self, worker: Worker, *, exit_first: bool = False) -> None:
        """The oldest thing a worker said reaches the job; its death can be seen before its last words."""
        if not worker.outbox:
            return
        event = worker.outbox.pop() if exit_first else worker.outbox.popleft()
        self.delivered.append(event)
        if worker is self.workers.get(worker.rank) and worker.rank not in self.gone:
            self.tell(event)
        else:
            self.tell_stale(event)

    def deliver_all(self) -> bool:
        found = False
        for worker in [*self.workers.values(), *self.former]:
            while worker.outbox:
                found = True
                self.deliver(worker)
        return found

    def pass_time(self, seconds: float) -> None:
        """The shell's timer: every deadline on the way is told."""
        until = self.now + seconds
        while (deadline := self.job.next_deadline()) is not None and deadline <= until:
            self.now = max(self.now, deadline)
            before = copy.deepcopy(self.job.state)
            self.tell(ev.TimePassed())
            assert self.job.state != before, "a deadline has passed, and nothing came of it"
        self.now = until

    # ---- commands --------------------------------------------------------------------------------------

    def _carry_out(self, command: cmd.Command) -> None:
        match command:
            case cmd.RunHook(name):
                assert self.hook is None
                assert all(rank in self.gone for rank in self.workers), "no worker lives while a hook runs"
                self.hook = name
            case cmd.Spawn():
                self._spawn(command)
            case cmd.Kill(rank, incarnation):
                worker = self.workers[rank]
                assert (worker.incarnation, rank in self.gone) == (incarnation, False)
                worker.killed = True
                self.waiting.pop(rank, None)
            case cmd.StopWorkers(signum):
                for worker in self.workers.values():
                    worker.asked_to_stop = True
                    worker.killed |= signum == 9
            case cmd.OpenEpoch(epoch):
                assert epoch > max(self.opened, default=NO_EPOCH), "an epoch is opened once, in order"
                self.opened.append(epoch)
            case cmd.FailEpoch(epoch):
                assert epoch > max(self.failed, default=NO_EPOCH), "an epoch fails once, in order"
                self.failed.append(epoch)
                for worker in self.workers.values():
                    if worker.epoch == epoch and worker.doing in (Doing.RUNNING, Doing.RETURNED):
                        worker.doing = Doing.UNWINDING
            case cmd.StartEpoch():
                self._start(command)
            case cmd.FinishEpoch() if self.job.phase in (Phase.STOPPING, Phase.RESTARTING):
                for worker in self.workers.values():
                    if worker.doing is Doing.RETURNED:
                        worker.doing = Doing.BETWEEN
            case cmd.FinishEpoch(epoch):
                for worker in self.workers.values():
                    assert worker.epoch == epoch
                    if worker.alive:
                        assert worker.doing is Doing.RETURNED
                        worker.doing = Doing.BETWEEN
            case cmd.RestartProcesses(_, number, limit):
                self.restarts += 1
                assert (number, limit) == (self.restarts, self.config.max_restarts)
                assert number <= limit
            case cmd.End():
                self._end(command)

    def _spawn(self, command: cmd.Spawn) -> None:
        former = self.workers.get(command.rank)
        if former is not None:
            assert command.rank in self.gone, "two live processes of one rank"
            self.former.append(former)
            self.spent.add(former.spawn_epoch)
        assert command.incarnation > max(self.incarnations, default=-1)
        assert command.epoch > max([*self.started, *self.failed, *self.spent], default=NO_EPOCH), "old keys"
        self.incarnations.append(command.incarnation)
        self.workers[command.rank] = Worker(command.rank, command.incarnation, command.epoch)
        self.gone.pop(command.rank, None)

    def _start(self, command: cmd.StartEpoch) -> None:
        epoch = command.epoch
        assert self.opened[-1] == epoch, "the store serves another epoch"
        assert epoch > max([*self.started, *self.failed], default=NO_EPOCH), "an epoch starts once, in order"
        assert set(self.waiting) == set(range(self.config.world_size)), "not everybody waits"
        self._check_plan(command)
        self.started.append(epoch)
        self.waiting.clear()
        for worker in self.workers.values():
            self.ran.add(worker.incarnation)
            worker.epoch = epoch
            worker.stepped = False
            if worker.alive:
                assert worker.doing is Doing.WAITING
                worker.doing = Doing.RUNNING
                if command.plan is not None:
                    worker.step = command.plan.target_step

    def _check_plan(self, command: cmd.StartEpoch) -> None:
        plan = command.plan
        holders = {
            rank: told.step for rank, told in self.waiting.items() if told.healthy and told.incarnation in self.ran
        }
        lost = len(holders) < self.config.world_size or len(set(holders.values())) > 1
        if plan is None:
            assert not self.ran.intersection(told.incarnation for told in self.waiting.values()) or (
                self.started[-1] not in self.failed
            ), "after a fault there is a plan"
        elif plan.source is None:
            assert not holders, "somebody holds the state"
        else:
            assert plan.target_step == max(holders.values()), "the newest whole state wins"
            assert holders[plan.source] == plan.target_step, "the source does not hold what it is to give"
            for rank in range(self.config.world_size):
                assert (rank in plan.receivers) != (holders.get(rank) == plan.target_step)
            for transfer in plan.transfers:
                assert holders[transfer.source] == plan.target_step, "who gives must have it"
            assert lost == bool(plan.receivers)

    def _end(self, command: cmd.End) -> None:
        self.end = command
        if command.exit_code == 0:
            assert not self.signals, "stopped, and nevertheless a success"
            assert not self.hook_failed
            assert self.gone == dict.fromkeys(range(self.config.world_size), 0), "not every process ended well"
        if self.signals:
            assert command.exit_code == cmd.EXIT_SIGNAL_BASE + self.signals[0]
        else:
            assert command.exit_code in (cmd.EXIT_OK, cmd.EXIT_FAILED, cmd.EXIT_STALLED)
        alive = tuple(sorted(set(self.workers) - set(self.gone)))
        assert command.left_behind == alive, "exactly the living are left behind"
        assert all(self.workers[rank].killed for rank in alive), "left behind without having been killed"

    # ---- what the job knows ----------------------------------------------------------------------------

    def _hear(self, event: ev.Event) -> None:
        match event:
            case ev.Exited(rank, incarnation, exit_code) if incarnation == self.workers[rank].incarnation:
                self.gone[rank] = exit_code
                self.waiting.pop(rank, None)
            case ev.Arrived(rank) if not self.workers[rank].killed:
                self.waiting[rank] = event

    def _check_state(self) -> None:
        if len(self.log) % 8 == 0:  # what is filed wrongly stays so
            check_files(self.job.state)
        state, deadline = self.job.state, self.job.next_deadline()
        match state.phase:
            case Phase.ASSEMBLING | Phase.RECOVERING:
                if any(slot.state is SlotState.WAITING for slot in state.slots):
                    for slot in state.slots:
                        at_barrier = slot.state is SlotState.WAITING
                        assert at_barrier != (slot.due is not None), "a survivor is forgotten"
                        assert not slot.gone, "somebody waits for a rank that nobody starts"
                    assert any(slot.due for slot in state.slots), "all wait and nothing starts"
                if state.phase is Phase.RECOVERING:
                    assert deadline is not None
            case Phase.RUNNING:
                assert {slot.state for slot in state.slots} <= {SlotState.RUNNING, SlotState.COMPLETED}
                assert deadline is None or any(slot.state is SlotState.COMPLETED for slot in state.slots)
            case Phase.RESTARTING | Phase.STOPPING:
                assert deadline is not None
                assert not state.everything_gone
            case Phase.ENDED:
                assert self.end is not None
                assert deadline is None
        assert state.restarts <= self.config.max_restarts
        assert state.inprocess_restarts == len(self.failed), "every failed epoch costs one restart, once"
        if self.config.max_inprocess_restarts is not None:
            assert state.inprocess_restarts <= self.config.max_inprocess_restarts

    # ---- at the end of a test --------------------------------------------------------------------------

    def behave(self) -> None:
        """From here on all workers do as they are told: the job must come to run an epoch, or to its end."""
        rounds = 40 * (1 + self.config.max_restarts + self.config.stall_limit)
        for _ in range(rounds):
            if self.job.phase in (Phase.RUNNING, Phase.ENDED):
                return
            if self.job.phase is Phase.NEW:
                self.tell(ev.Begin())
            elif self.hook is not None:
                self.tell(ev.HookEnded(0))
            elif not self.deliver_all() and not self._everybody_acts():
                deadline = self.job.next_deadline()
                assert deadline is not None, f"nothing is pending in {self.job.phase}"
                self.pass_time(deadline - self.now)
        raise AssertionError(f"neither running nor ended after {rounds} rounds: {self.job.state}")

    def _everybody_acts(self) -> bool:
        for worker in self.workers.values():
            if worker.alive and worker.killed:
                worker.die(-9)
            elif worker.alive and worker.asked_to_stop:
                worker.die(-15)
            elif worker.doing is not Doing.RUNNING:
                worker.act(go_on=bool(self.waiting))
        return any(worker.outbox for worker in self.workers.values())

    def replay(self) -> None:
        """The same events again: the same commands, and the same job in the end."""
        job = Job(self.config)
        assert [job.handle(event, now) for event, now in self.log] == self.answers
        assert job.state == self.job.state


def same_but_for_drops(one: JobState, other: JobState) -> bool:
    return msgspec.structs.replace(one, dropped=other.dropped) == other
