"""A controller at its job: events from all nodes go in, commands go to the nodes that they concern.

The job itself is decided by `job.Job`, as on one node. Who the nodes are is `leader.py`'s.
"""

from __future__ import annotations

from collections import deque
from itertools import chain

from msgspec.structs import replace

from ...job import commands as cmd
from ...job import events as ev
from ...job.addressing import deliver
from ...job.job import Job
from ..link import Link
from ..members import Member
from ..messages import Ended, JobMemory, Order, Ordered, Report, Tell, number_in
from ..roles import Context, Role
from .takeover import remember

_Outgoing = tuple[Ordered, JobMemory | None]


class Progress:
    """A member as its controller sees it."""

    def __init__(self, member: Member, now: float, attempt: int) -> None:
        self.member = member
        self.link: Link[_Outgoing, Tell] = Link()
        self.heard = now
        self.attempt = attempt
        self.report: Report | None = None
        self.needs_configurations = False
        self.shards_at = (0, 0)
        """Which table of shards it has been told of in its link."""


class Directing(Role):
    """The part of a controller that has a job and followers."""

    def __init__(self, context: Context, term: int) -> None:
        super().__init__(context)
        self.term = term
        self._followers: dict[int, Progress] = {}
        self._job: Job | None = None
        self._job_due: float | None = None
        self._pending: deque[ev.Event] = deque()
        self._busy = False
        self._moments = 0
        """Counts what was decided, so that of two memories the newer is known."""
        self._told_memory: JobMemory | None = None
        self._news_shards_at = (0, 0)
        self._end: cmd.End | None = None
        self._end_due = 0.0
        self._not_confirmed: list[Progress] | None = None
        """Of the followers: who may not have confirmed the end yet. Each is looked at once."""

    @property
    def has_job(self) -> bool:
        """Whether it has taken the job over, or begun it."""
        return self._job is not None

    @property
    def has_its_timer(self) -> bool:
        """Whether `next_deadline` will not miss a deadline of the job; asked by the simulator after every step."""
        due = None if self._job is None or self._end is not None else self._job.next_deadline()
        return due is None or (self._job_due is not None and self._job_due <= due)

    def _run(self, event: ev.Event | None) -> None:
        """The job's answer to an event, and to those that its own commands bring about here."""
        if event is not None:
            self._pending.append(event)
        if self._busy or self._job is None:
            return
        self._busy = True
        moved = self._job.state.dues_moved
        changed = isinstance(event, ev.TimePassed)
        while self._pending:
            commands = self._job.handle(self._pending.popleft(), self.context.now)
            changed |= bool(commands)
            self._carry_out(commands)
        if changed or self._job.state.dues_moved != moved:
            self._job_due = self._job.next_deadline()
        self._busy = False
        self._finish_ending()

    def _carry_out(self, commands: list[cmd.Command]) -> None:
        assert self._job is not None
        if not commands:
            return
        context = self.context
        self._moments += 1
        memory = self._tell_memory()
        for command in commands:
            if isinstance(command, cmd.End):
                self._end = command
                self._end_due = context.now + context.config.close_timeout
            carries_memory = not isinstance(command, cmd.Spawn | cmd.Kill)
            for number, addressed in deliver(self._job.state, command, chain((context.number or 0,), self._followers)):
                if number == context.number:
                    self._carry_out_here(addressed)
                elif number in self._followers:
                    self._order(self._followers[number], addressed, memory if carries_memory else None)

    def _carry_out_here(self, command: cmd.Command) -> None:
        context = self.context
        if isinstance(command, cmd.End):
            return
        context.execute(command, (self.term, self._moments))
        number = number_in(command)
        if number is not None and context.number is not None:
            self._pending.append(ev.Opened(context.number, number))

    def _finish_ending(self, *, at_once: bool = False) -> None:
        """The end is told to everybody first."""
        if self._end is not None and (at_once or self._all_know_the_end()):
            self.context.actions.append(Ended(self._end))

    def _all_know_the_end(self) -> bool:
        """After the end nothing is sent any more: who has confirmed all has confirmed it."""
        if self._not_confirmed is None:
            self._not_confirmed = list(self._followers.values())
        left = self._not_confirmed
        while left and (left[-1].link.all_confirmed or left[-1].member.number not in self._followers):
            left.pop()
        return not left

    def _memory(self) -> JobMemory | None:
        if self._job is None:
            return None
        return remember(self._job.state, (self.term, self._moments), (self.term, self._job.state.shards.version))

    def _tell_memory(self) -> JobMemory:
        """What every node is about to be told; the table of shards only where it is not known."""
        memory = self._memory()
        assert memory is not None
        self.context.local.remember(memory)
        self._told_memory = memory
        return memory

    def _news(self) -> JobMemory | None:
        """What followers have told since the last command went out."""
        memory = self._memory()
        if memory is None or self._told_memory is None or replace(self._told_memory, at=memory.at) == memory:
            return None
        self._moments += 1
        told = self._tell_memory()
        known = self._news_shards_at == told.shards_at
        self._news_shards_at = told.shards_at
        return replace(told, shards=None) if known else told

    def _holds(self, number: int, event: ev.WorkerEvent) -> bool:
        """Whether this process is where the event comes from: no node speaks for another's."""
        assert self._job is not None
        slot = self._job.state.find(event.rank, event.incarnation)
        return slot is not None and slot.node == number

    def _order(self, follower: Progress, command: Ordered, memory: JobMemory | None) -> None:
        if memory is not None and memory.shards is not None:
            if memory.shards_at == follower.shards_at:
                memory = replace(memory, shards=None)
            follower.shards_at = memory.shards_at
        serial = follower.link.send((command, memory), self.context.now)
        received, number = follower.link.received, follower.member.number
        self.context.send(follower.member.address, Order(self.term, number, serial, received, command, memory))

    def _resend(self, follower: Progress) -> None:
        for serial, (command, memory) in follower.link.overdue(self.context.now):
            number, received = follower.member.number, follower.link.received
            order = Order(self.term, number, serial, received, command, memory)
            self.context.send(follower.member.address, order)
