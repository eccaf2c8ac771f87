"""The controller's role: who is a member, what a majority has agreed on, and when the job is taken over.

It acts for the job (`directing.py`) only after a quorum has agreed on a membership in its own term.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from ..job import commands as cmd
from ..job import events as ev
from ..job.job import Job
from ..job.state import NodeState
from .admission import tell_difference, why_refused
from .becoming import BecomeCandidate, BecomeFounding, BecomeLeader, Next
from .directing import Directing, Progress
from .following import follow
from .members import Configuration, ConfigurationChange, Configurations, Member
from .messages import (
    Acknowledge,
    Heartbeat,
    Hold,
    Join,
    Lead,
    Leave,
    PeerMessage,
    Propose,
    Redirect,
    Refuse,
    Release,
    Report,
    RequestVote,
    Settled,
    Tell,
    Vote,
)
from .roles import Context
from .takeover import rebuild, was_begun

_NEARLY = 0.9
_CALLED_BACK = 64
"""Of so many lost members it is tried whether they are there again, also where no seed is left to send them here."""


class Leader(Directing):
    """One term."""

    def __init__(self, context: Context, elected: BecomeLeader) -> None:
        super().__init__(context, elected.term)
        configurations, lost, voters = elected.configurations, elected.lost, elected.voters
        self._voters = voters
        self._new = elected.joins
        self._configurations = configurations
        self._founding = elected.joins if elected.founds else None
        self._reason = elected.reason
        self._lost = lost
        self._elected: Configurations | None = None if elected.founds else configurations
        """Until something is agreed on in this term, its voters count as they did at the election, too."""
        self._wanted = {member.number: member for member in configurations.proposed.members if member != lost}
        keys = {member.key for member in self._wanted.values()}
        back = [member for member in configurations.agreed.members if member.key in voters and member.key not in keys]
        self._wanted.update({member.number: member for member in back})
        """Who was given up before that was agreed on, and is there."""
        self._next_number = configurations.proposed.next_number
        self._epochs: dict[int, int] = {}
        """The highest epoch numbers that joining nodes have seen."""
        self._by_key: dict[str, Progress] = {}
        self._acknowledged: set[int] = set()
        self._serial = 0
        self._next_heartbeat = context.now + context.config.heartbeat_interval
        self._silent_due = context.now + context.config.heartbeat_limit
        """No follower has been silent for too long before that."""
        self._enough = False
        """A majority has reported: the others are not waited for as long."""
        self._early: list[tuple[int, Tell]] = []
        """What followers have told after their reports and before the job was there."""
        self._deadline = context.now + context.config.join_timeout

    # ---- the role ------------------------------------------------------------------------------------------------

    def begin(self) -> Next | None:
        context = self.context
        for member in self._configurations.everybody().values():
            if member.key != context.config.key:
                join = (self._new or {}).get(member.key)
                follower = Progress(member, context.now, join.attempt if join else 0)
                follower.needs_configurations = self._new is not None
                if member.number in self._wanted:
                    self._followers[member.number] = follower
                    self._by_key[member.key] = follower
        if self._founding is not None:
            self._epochs = {m.number: self._founding[m.key].epoch for m in self._wanted.values()}
        context.note("leads", term=self.term, nodes=len(self._wanted), reason=self._reason or None)
        return self._propose()

    def received(self, key: str, address: str, message: PeerMessage) -> Next | None:
        context = self.context
        match message:
            case Join():
                return self._join(key, address, message)
            case RequestVote():
                leader = context.config.address
                context.send(address, Vote(message.term, message.pre, granted=False, leader=leader))
                return None
            case Lead() if message.term > self.term and self._job is None:
                return follow(context, key, address, message)
        follower = self._by_key.get(key)
        if follower is None:
            if isinstance(message, Tell | Heartbeat) and message.term <= self.term:
                reason = "it is no member any more"
                context.send(address, Release(message.term, message.link, reason, removed=True))
            return None
        match message:
            case Hold():
                follower.needs_configurations = True
                self._send_lead(follower)
            case Tell() if (message.term, message.link) == (self.term, follower.member.number):
                follower.heard = context.now
                follower.link.confirm(message.received)
                for event in follower.link.receive(message.serial, message):
                    becomes = self._told(follower, event)
                    if becomes is not None:
                        return becomes
            case Heartbeat() if (message.term, message.link) == (self.term, follower.member.number):
                follower.heard = context.now
                follower.link.confirm(message.received)
                self._resend(follower)
                if follower.link.must_ask(message.sent, context.now):
                    link = follower.link
                    context.send(address, Heartbeat(self.term, message.link, link.sent, link.received))
        self._finish_ending()
        return None

    def closed(self, address: str, key: str) -> Next | None:
        for follower in [f for f in self._followers.values() if f.member.address == address]:
            if key in ("", follower.member.key):
                return self._drop(follower, "closed its connection")
        return None

    def happened(self, event: ev.Event) -> Next | None:
        match event:
            case ev.WorkerEvent():
                self._run(event)
                return None
            case ev.HookEnded() if self.context.number is not None:
                self._run(ev.HookEnded(event.exit_code, self.context.number))
                return None
        return None

    def leave(self, reason: str) -> None:
        for number, follower in self._followers.items():
            self.context.send(follower.member.address, Release(self.term, number, f"leaves: {reason}"))

    def tick(self) -> Next | None:
        context, config = self.context, self.context.config
        if self._end is not None and context.now >= self._end_due:
            self._finish_ending(at_once=True)
            return None
        becomes = self._drop_the_silent()
        if becomes is not None:
            return becomes
        if self._job is None and self._end is None and context.now >= self._deadline:
            reason = f"too few nodes came within {config.join_timeout:g} s (--rdzv-conf join_timeout)"
            self._end_without_job(cmd.End(cmd.EXIT_FAILED, reason))
            self._finish_ending()
            return None
        if context.now >= self._next_heartbeat:
            self._heartbeat()
        if self._job_due is not None and context.now >= self._job_due:
            self._run(ev.TimePassed())
            return None
        return None

    def next_deadline(self) -> float | None:
        dues = [self._next_heartbeat, self._silent_due]
        if self._job is None and self._end is None:
            dues.append(self._deadline)
            limits = self._limits()
            dues += [f.heard + limits(f) for f in self._followers.values() if f.report is None]
        if self._job_due is not None:
            dues.append(self._job_due)
        if self._end is not None:
            dues.append(self._end_due)
        return min(dues)

    def _drop_the_silent(self) -> Next | None:
        """Who has been silent nearly as long as another is lost with it: of a rack, at once and not one by one."""
        context, config = self.context, self.context.config
        limits = self._limits()
        due = any(context.now >= f.heard + limits(f) for f in self._followers.values())
        part = _NEARLY if due else 1.0
        silent = [number for number, f in self._followers.items() if context.now >= f.heard + part * limits(f)]
        for number in silent:
            if number in self._followers:
                reason = f"was silent for {limits(self._followers[number]):g} s"
                becomes = self._drop(self._followers[number], reason, silent=True)
                if becomes is not None:
                    return becomes
        if silent and self._end is None:
            becomes = self._propose()
            if becomes is not None:
                return becomes
        heard = min((follower.heard for follower in self._followers.values()), default=context.now)
        self._silent_due = heard + config.heartbeat_limit
        return None

    def _limits(self) -> Callable[[Progress], float]:
        """How long a follower may be silent. Until the job is taken over, who may not be there has less time.

        Who has voted is there, and so may be who is needed for a majority.
        """
        config = self.context.config
        if self._job is not None:
            return lambda follower: config.heartbeat_limit
        if not self._enough:
            reported = [f.member.key for f in self._followers.values() if f.report is not None]
            self._enough = self._has_quorum([*reported, config.key])

        def limit(follower: Progress) -> float:
            hurry = self._enough and follower.report is None and follower.member.key not in self._voters
            return config.takeover_grace if hurry else config.heartbeat_limit

        return limit

    def _has_quorum(self, keys: Collection[str]) -> bool:
        """Whether these agents may act for the membership."""
        quorum = self.context.config.min_quorum
        if len(keys) < self._configurations.proposed.quorum(quorum):
            return False  # which saves counting all members
        asked = [self._configurations] if self._elected is None else [self._configurations, self._elected]
        return all(configurations.has_quorum(configurations.numbers_of(keys), quorum) for configurations in asked)

    def _end_without_job(self, end: cmd.End) -> None:
        """There is none to take over; nobody else need wait for it as long again."""
        self._end, self._end_due = end, self.context.now + self.context.config.close_timeout
        for follower in self._followers.values():
            self._order(follower, end, None)

    # ---- members -------------------------------------------------------------------------------------------------

    def _join(self, key: str, address: str, join: Join) -> Next | None:
        """A new agent, or one that has lost us and begins anew."""
        context = self.context
        reason = why_refused(context, join)
        if reason or self._end is not None:
            context.send(address, Refuse(reason or "the job is over"))
            return None
        if self._founding is None and self._is_promised(join):
            return self._stand_again(join)
        known = self._by_key.get(key)
        if known is not None and join.attempt <= known.attempt:
            if known.report is None:
                self._send_lead(known)
            return None
        for other in [f for f in self._followers.values() if f.member.address == address or f is known]:
            reason = "began anew" if other is known else "was started again at its address"
            becomes = self._drop(other, reason, is_back=other is known)
            if becomes is not None:
                return becomes
        number, self._next_number = self._next_number, self._next_number + 1
        member = Member(number, key, join.host, address, join.workers, join.role)
        follower = Progress(member, context.now, join.attempt)
        follower.needs_configurations = True
        self._followers[number] = self._by_key[key] = follower
        self._wanted[number] = member
        self._epochs[number] = join.epoch
        tell_difference(context, join)
        context.note("node-joins", node=number, host=join.host, address=address)
        context.send(address, Hold())
        return self._propose()

    def _is_promised(self, join: Join) -> bool:
        """To a candidate of a later term, who was not elected."""
        if join.job != self._configurations.proposed.founder:
            return False
        another = join.voted not in ("", self.context.config.key)
        return join.term > self.term or (join.term == self.term and another)

    def _stand_again(self, join: Join) -> Next:
        """In a term that everybody can follow. What runs goes on meanwhile."""
        context = self.context
        context.term = max(context.term, join.term)
        reason = f"a node that comes back has voted in term {join.term}: there is an election"
        for number, follower in self._followers.items():
            context.send(follower.member.address, Release(self.term, number, reason))
        return BecomeCandidate(context.config.key, reason)

    def _drop(self, follower: Progress, reason: str, *, is_back: bool = False, silent: bool = False) -> Next | None:
        """A member is lost. `is_back`: with its place and workers, but the agent is there and asks to be another.

        `silent`: it may be cut off and alive. Others may be lost with it, and what follows is dealt with once.
        """
        context, member = self.context, follower.member
        del self._followers[member.number]
        if self._by_key.get(member.key) is follower:
            del self._by_key[member.key]
        self._wanted.pop(member.number, None)
        self._acknowledged.discard(member.number)
        context.send(member.address, Release(self.term, member.number, reason, removed=True))
        context.note("node-lost", node=member.number, host=member.host, reason=reason)
        if self._end is not None:
            self._finish_ending()
            return None
        if self._founding is not None:
            return self._form_again()
        keys = {context.config.key, *self._by_key, *([member.key] if is_back else [])}
        if not self._has_quorum(keys):
            return self._step_down(self._configurations.numbers_of(keys), at_once=silent)
        if self._job is not None:
            self._run(ev.NodeLost(member.number, f"node {member.number} ({member.host}) {reason}"))
        return None if silent else self._propose()

    def _propose(self) -> Next | None:
        """The members that should be, unless that is what was proposed last."""
        context = self.context
        members = tuple(self._wanted[number] for number in sorted(self._wanted))
        if self._serial == 0 or members != self._configurations.proposed.members:
            self._serial += 1
            base = self._configurations.agreed
            proposed = Configuration(self.term, self._serial, members, self._next_number, base.founder, base.succeeds)
            self._configurations = Configurations(base, proposed)
            context.change_configurations(self._configurations)
            self._acknowledged = set()
            for follower in self._followers.values():
                if follower.report is None:
                    self._send_lead(follower)
                else:
                    self._order(follower, Propose(ConfigurationChange.between(base, proposed)), self._memory())
        return self._settle()

    def _send_lead(self, follower: Progress) -> None:
        change = ConfigurationChange.between(self._configurations.agreed, self._configurations.proposed)
        configurations = self._configurations if follower.needs_configurations else None
        job = self._configurations.proposed.founder
        self.context.send(follower.member.address, Lead(self.term, change, configurations, self._memory(), job))

    def _settle(self) -> Next | None:
        """Has a quorum of both memberships acknowledged the proposal?"""
        context, proposed = self.context, self._configurations.proposed
        if self._configurations.agreed.id == proposed.id:
            return self._take_over()
        if len(self._acknowledged) + 1 < proposed.quorum(context.config.min_quorum):
            return None  # which saves counting all members for every one that answers
        keys = {context.config.key, *(self._followers[number].member.key for number in self._acknowledged)}
        if self._has_quorum(keys):
            self._elected = None
            before = {member.number for member in self._configurations.agreed.members}
            self._configurations = context.configurations = Configurations(proposed, proposed)
            for follower in self._followers.values():
                if follower.report is not None:
                    self._order(follower, Settled(proposed.id), None)
            if self._job is not None:
                for member in proposed.members:
                    if member.number not in before or member.number not in self._job.state.nodes:
                        epoch = self._epochs.get(member.number, -1)
                        self._pending.append(ev.NodeJoined(member.number, member.workers, epoch, member.role))
                self._pending.append(ev.NodesAgreed(proposed.quorum(context.config.min_quorum)))
                self._run(None)
                return None
        return self._take_over()

    def _step_down(self, live: set[int], *, at_once: bool) -> Next:
        """`at_once`: the others may have begun to go on without this node, whose workers are stopped.

        Where an agent has died, it can be started again; what the workers here hold is kept for that, a short time.
        """
        context = self.context
        agreed = self._configurations.agreed
        present = sum(member.number in live for member in agreed.members)
        needed = agreed.quorum(context.config.min_quorum)
        hint = " (--min-nodes 1 would let one go on alone)" if len(agreed.members) == 2 else ""
        reason = f"no majority: {present} of {len(agreed.members)} nodes, {needed} are needed{hint}"
        context.note("minority", reason=reason)
        for number, follower in self._followers.items():
            context.send(follower.member.address, Release(self.term, number, f"had {reason}"))
        if at_once:
            context.kill_workers(reason)
        return BecomeCandidate(context.config.key, f"had {reason}", stranded=at_once)

    def _form_again(self) -> Next:
        """Somebody was lost before the job had begun."""
        for number, follower in self._followers.items():
            self.context.send(follower.member.address, Release(self.term, number, "nodes are missing", removed=True))
        self.context.configurations = Configurations()
        return BecomeFounding()

    # ---- the job -------------------------------------------------------------------------------------------------

    def _take_over(self) -> Next | None:
        """Once all have reported, or those who have not are given up."""
        context = self.context
        if self._job is not None or self._configurations.agreed.term != self.term or context.number is None:
            return None
        if any(follower.report is None for follower in self._followers.values()):
            return None
        reports = {number: f.report for number, f in self._followers.items() if f.report is not None}
        reports[context.number] = context.local.report(self._configurations.proposed.id)
        members = [self._wanted[number] for number in sorted(self._wanted)]
        nodes = {member.number: NodeState(member.workers, member.role) for member in members}
        quorum = ev.NodesAgreed(self._configurations.proposed.quorum(context.config.min_quorum))
        if self._founding is not None or not was_begun(reports):
            if len(nodes) < context.config.job.min_nodes:
                return None  # the founder was lost before the job began; others may come
            self._job = Job(context.config.job, nodes)
            epochs = [*self._epochs.values(), *(report.epoch for report in reports.values())]
            self._job.state.next_epoch = max(epochs, default=-1) + 1
            self._founding = None
            self._pending += [quorum, ev.Begin()]
            return self._catch_up()
        lost = self._lost
        what = "a node" if lost is None else f"node {lost.number} ({lost.host})"
        cause = cmd.Cause("node", None, f"{what}, which led the job, {self._reason or 'is lost'}")
        state, commands = rebuild(context.config.job, nodes, reports, cause, context.now)
        self._job = Job.resume(state)
        self._carry_out(commands)
        self._job_due = self._job.next_deadline()
        self._pending.append(quorum)
        return self._catch_up()

    def _catch_up(self) -> Next | None:
        self._run(None)
        early, self._early = self._early, []
        for number, tell in early:
            follower = self._followers.get(number)
            becomes = None if follower is None else self._told(follower, tell)
            if becomes is not None:
                return becomes
        return None

    def _told(self, follower: Progress, tell: Tell) -> Next | None:
        event, number = tell.event, follower.member.number
        if self._job is None and not isinstance(event, Report | Acknowledge | Leave):
            self._early.append((number, tell))
            return None
        match event:
            case Report():
                if follower.report is None:
                    follower.report = event
                    self.context.local.learn(event)
                    if event.configuration == self._configurations.agreed.id == self._configurations.proposed.id:
                        self._order(follower, Settled(event.configuration), None)  # the others were told before
                    return self._acknowledge(number, event.configuration)
            case Acknowledge():
                return self._acknowledge(number, event.configuration)
            case Leave():
                return self._drop(follower, f"left: {event.reason}")
            case ev.HookEnded():
                self._run(ev.HookEnded(event.exit_code, number))
                return None
            case ev.Opened():
                self._run(ev.Opened(number, event.epoch))
                return None
            case ev.WorkerEvent():
                if self._holds(number, event):
                    self._run(event)
                    return None
        return None

    def _acknowledge(self, number: int, configuration: tuple[int, int]) -> Next | None:
        follower = self._followers[number]
        if configuration == self._configurations.proposed.id:
            self._acknowledged.add(number)
        elif follower.report is not None and follower.report.configuration == configuration:
            # It followed an earlier proposal, which it can only have been sent as a Lead.
            self._order(
                follower,
                Propose(ConfigurationChange.between(self._configurations.agreed, self._configurations.proposed)),
                self._memory(),
            )
        return self._settle()

    def _heartbeat(self) -> None:
        context = self.context
        self._next_heartbeat = context.now + context.config.heartbeat_interval
        memory = self._news()
        for number, follower in self._followers.items():
            if follower.report is None:
                self._send_lead(follower)
            beat = Heartbeat(self.term, number, follower.link.sent, follower.link.received, memory)
            context.send(follower.member.address, beat)
        held = {member.address for member in self._wanted.values()}
        absent = [address for address in context.met if address not in held]
        for address in dict.fromkeys([*context.config.seeds, *absent[-_CALLED_BACK:]]):
            if address not in held:  # somebody may have been started again there, and know nobody or think he is first
                context.send(address, Redirect(context.config.address))
