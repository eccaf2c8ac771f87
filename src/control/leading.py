"""The controller's role: who is a member, what a majority has agreed on, and when the job is taken over.

It acts for the job (`directing.py`) only after a quorum has agreed on a membership in its own term.
"""

from __future__ import annotations

from . import commands as cmd
from . import events as ev
from .directing import Directing, Follower
from .following import follow
from .job import Job
from .leaderless import Leaderless
from .members import Member, View, ViewChange, Views
from .messages import (
    Acknowledge,
    Beat,
    Claim,
    Ended,
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
    Settled,
    Tell,
    Vote,
)
from .roles import Context, Role
from .seeking import Forming, tell_difference, why_refused
from .state import NodeState
from .takeover import rebuild, was_begun


class Leading(Directing):
    """One term. `views`: what this agent knew when it was elected."""

    def __init__(
        self,
        context: Context,
        term: int,
        views: Views,
        *,
        lost: Member | None = None,
        reason: str = "",
        founding: dict[str, Join] | None = None,
    ) -> None:
        super().__init__(context, term)
        self._views = views
        self._founding = founding
        self._reason = reason
        self._lost = lost
        self._wanted = {member.number: member for member in views.proposed.members if member != lost}
        self._next_number = views.proposed.next_number
        self._epochs: dict[int, int] = {}
        """The highest epoch numbers that joining nodes have seen."""
        self._by_key: dict[str, Follower] = {}
        self._acknowledged: set[int] = set()
        self._serial = 0
        self._next_beat = context.now + context.config.heartbeat_interval
        self._silent_due = context.now + context.config.heartbeat_limit
        """No follower has been silent for too long before that."""
        self._early: list[tuple[int, Tell]] = []
        """What followers have told after their reports and before the job was there."""
        self._deadline = context.now + context.config.join_timeout

    # ---- the role ------------------------------------------------------------------------------------------------

    def begin(self) -> Role | None:
        context = self.context
        for member in self._views.everybody().values():
            if member.key != context.config.key:
                join = (self._founding or {}).get(member.key)
                follower = Follower(member, context.now, join.attempt if join else 0)
                follower.needs_views = self._founding is not None
                if member.number in self._wanted:
                    self._followers[member.number] = follower
                    self._by_key[member.key] = follower
        if self._founding is not None:
            self._epochs = {m.number: self._founding[m.key].epoch for m in self._wanted.values()}
        context.note("leads", term=self.term, nodes=len(self._wanted), reason=self._reason or None)
        return self._propose()

    def received(self, key: str, address: str, message: PeerMessage) -> Role | None:
        context = self.context
        match message:
            case Join():
                return self._join(key, address, message)
            case Claim():
                leader = context.config.address
                context.send(address, Vote(message.term, message.real, granted=False, leader=leader))
                return None
            case Lead() if message.term > self.term and self._job is None:
                return follow(context, key, address, message)
        follower = self._by_key.get(key)
        if follower is None:
            if isinstance(message, Tell | Beat) and message.term <= self.term:
                reason = "it is no member any more"
                context.send(address, Release(message.term, message.link, reason, removed=True))
            return None
        match message:
            case Hold():
                follower.needs_views = True
                self._send_lead(follower)
            case Tell() if (message.term, message.link) == (self.term, follower.member.number):
                follower.heard = context.now
                follower.link.confirm(message.received)
                for event in follower.link.receive(message.serial, message):
                    role = self._told(follower, event)
                    if role is not None:
                        return role
            case Beat() if (message.term, message.link) == (self.term, follower.member.number):
                follower.heard = context.now
                follower.link.confirm(message.received)
                self._resend(follower)
                if follower.link.must_ask(message.sent, context.now):
                    link = follower.link
                    context.send(address, Beat(self.term, message.link, link.sent, link.received))
        return self._finish_ending()

    def closed(self, address: str, key: str) -> Role | None:
        for follower in [f for f in self._followers.values() if f.member.address == address]:
            if key in ("", follower.member.key):
                return self._drop(follower, "closed its connection")
        return None

    def happened(self, event: ev.Event) -> Role | None:
        match event:
            case ev.WorkerEvent():
                return self._run(event)
            case ev.HookEnded() if self.context.number is not None:
                return self._run(ev.HookEnded(event.exit_code, self.context.number))
        return None

    def leave(self, reason: str) -> None:
        for number, follower in self._followers.items():
            self.context.send(follower.member.address, Release(self.term, number, f"leaves: {reason}"))

    def tick(self) -> Role | None:
        context, config = self.context, self.context.config
        if self._end is not None and context.now >= self._end_due:
            return self._finish_ending(at_once=True)
        role = self._drop_the_silent()
        if role is not None:
            return role
        if self._job is None and context.now >= self._deadline:
            reason = f"too few nodes came within {config.join_timeout:g} s (--rdzv-conf join_timeout)"
            context.actions.append(Ended(cmd.End(cmd.EXIT_FAILED, reason)))
        if context.now >= self._next_beat:
            self._beat()
        if self._job_due is not None and context.now >= self._job_due:
            return self._run(ev.TimePassed())
        return None

    def next_deadline(self) -> float | None:
        dues = [self._next_beat, self._silent_due]
        if self._job is None:
            dues.append(self._deadline)
            grace = self.context.config.takeover_grace
            dues += [follower.heard + grace for follower in self._followers.values() if follower.report is None]
        if self._job_due is not None:
            dues.append(self._job_due)
        if self._end is not None:
            dues.append(self._end_due)
        return min(dues)

    def _drop_the_silent(self) -> Role | None:
        context, config = self.context, self.context.config
        for follower in list(self._followers.values()):
            waited = context.now >= follower.heard + config.takeover_grace
            unreported = follower.report is None and self._job is None and waited
            silent = context.now >= follower.heard + config.heartbeat_limit
            if unreported or silent:
                limit = config.takeover_grace if unreported else config.heartbeat_limit
                role = self._drop(follower, f"was silent for {limit:g} s")
                if role is not None:
                    return role
        heard = min((follower.heard for follower in self._followers.values()), default=context.now)
        self._silent_due = heard + config.heartbeat_limit
        return None

    # ---- members -------------------------------------------------------------------------------------------------

    def _join(self, key: str, address: str, join: Join) -> Role | None:
        """A new agent, or one that has lost us and begins anew."""
        context = self.context
        reason = why_refused(context, join)
        if reason or self._end is not None:
            context.send(address, Refuse(reason or "the job is over"))
            return None
        known = self._by_key.get(key)
        if known is not None and join.attempt <= known.attempt:
            if known.report is None:
                self._send_lead(known)
            return None
        for other in [f for f in self._followers.values() if f.member.address == address or f is known]:
            reason = "began anew" if other is known else "was started again at its address"
            role = self._drop(other, reason, is_back=other is known)
            if role is not None:
                return role
        number, self._next_number = self._next_number, self._next_number + 1
        member = Member(number, key, join.host, address, join.workers, join.role)
        follower = Follower(member, context.now, join.attempt)
        follower.needs_views = True
        self._followers[number] = self._by_key[key] = follower
        self._wanted[number] = member
        self._epochs[number] = join.epoch
        tell_difference(context, join)
        context.note("node-joins", node=number, host=join.host, address=address)
        context.send(address, Hold())
        return self._propose()

    def _drop(self, follower: Follower, reason: str, *, is_back: bool = False) -> Role | None:
        """A member is lost. `is_back`: with its place and workers, but the agent is there and asks to be another."""
        context, member = self.context, follower.member
        del self._followers[member.number]
        if self._by_key.get(member.key) is follower:
            del self._by_key[member.key]
        self._wanted.pop(member.number, None)
        self._acknowledged.discard(member.number)
        context.send(member.address, Release(self.term, member.number, reason, removed=True))
        context.note("node-lost", node=member.number, host=member.host, reason=reason)
        if self._end is not None:
            return self._finish_ending()
        if self._founding is not None:
            return self._form_again()
        keys = {context.config.key, *self._by_key, *([member.key] if is_back else [])}
        live = self._views.numbers_of(keys)
        if not self._views.has_quorum(live, context.config.min_quorum):
            return self._step_down(live)
        if self._job is not None:
            self._run(ev.NodeLost(member.number, f"node {member.number} ({member.host}) {reason}"))
        return self._propose()

    def _propose(self) -> Role | None:
        """The members that should be, unless that is what was proposed last."""
        context = self.context
        members = tuple(self._wanted[number] for number in sorted(self._wanted))
        if self._serial == 0 or members != self._views.proposed.members:
            self._serial += 1
            base = self._views.agreed
            proposed = View(self.term, self._serial, members, self._next_number, base.founder)
            self._views = Views(base, proposed)
            context.change_views(self._views)
            self._acknowledged = set()
            for follower in self._followers.values():
                if follower.report is None:
                    self._send_lead(follower)
                else:
                    self._order(follower, Propose(ViewChange.between(base, proposed)), self._memory())
        return self._settle()

    def _send_lead(self, follower: Follower) -> None:
        change = ViewChange.between(self._views.agreed, self._views.proposed)
        views = self._views if follower.needs_views else None
        self.context.send(follower.member.address, Lead(self.term, change, views, self._memory()))

    def _settle(self) -> Role | None:
        """Has a quorum of both memberships acknowledged the proposal?"""
        context, proposed = self.context, self._views.proposed
        if self._views.agreed.id == proposed.id:
            return self._take_over()
        if len(self._acknowledged) + 1 < proposed.quorum(context.config.min_quorum):
            return None  # which saves counting all members for every one that answers
        keys = {context.config.key, *(self._followers[number].member.key for number in self._acknowledged)}
        present = self._views.numbers_of(keys)
        if self._views.has_quorum(present, context.config.min_quorum):
            before = {member.number for member in self._views.agreed.members}
            self._views = context.views = Views(proposed, proposed)
            for follower in self._followers.values():
                if follower.report is not None:
                    self._order(follower, Settled(proposed.id), None)
            if self._job is not None:
                for member in proposed.members:
                    if member.number not in before or member.number not in self._job.state.nodes:
                        epoch = self._epochs.get(member.number, -1)
                        self._pending.append(ev.NodeJoined(member.number, member.workers, epoch, member.role))
                self._pending.append(ev.NodesAgreed(proposed.quorum(context.config.min_quorum)))
                return self._run(None)
        return self._take_over()

    def _step_down(self, live: set[int]) -> Role:
        context = self.context
        agreed = self._views.agreed
        present = sum(member.number in live for member in agreed.members)
        needed = agreed.quorum(context.config.min_quorum)
        hint = " (--min-nodes 1 would let one go on alone)" if len(agreed.members) == 2 else ""
        reason = f"no majority: {present} of {len(agreed.members)} nodes, {needed} are needed{hint}"
        context.note("minority", reason=reason)
        for number, follower in self._followers.items():
            context.send(follower.member.address, Release(self.term, number, reason))
        context.kill_workers(reason)
        return Leaderless(context, context.config.key, reason, stranded=True)

    def _form_again(self) -> Role:
        """Somebody was lost before the job had begun."""
        for number, follower in self._followers.items():
            self.context.send(follower.member.address, Release(self.term, number, "nodes are missing", removed=True))
        self.context.views = Views()
        return Forming(self.context)

    # ---- the job -------------------------------------------------------------------------------------------------

    def _take_over(self) -> Role | None:
        """Once all have reported, or those who have not are given up."""
        context = self.context
        if self._job is not None or self._views.agreed.term != self.term or context.number is None:
            return None
        if any(follower.report is None for follower in self._followers.values()):
            return None
        reports = {number: f.report for number, f in self._followers.items() if f.report is not None}
        reports[context.number] = context.local.report(self._views.proposed.id)
        members = [self._wanted[number] for number in sorted(self._wanted)]
        nodes = {member.number: NodeState(member.workers, member.role) for member in members}
        quorum = ev.NodesAgreed(self._views.proposed.quorum(context.config.min_quorum))
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

    def _catch_up(self) -> Role | None:
        role = self._run(None)
        early, self._early = self._early, []
        for number, tell in early:
            follower = self._followers.get(number)
            if role is None and follower is not None:
                role = self._told(follower, tell)
        return role

    def _told(self, follower: Follower, tell: Tell) -> Role | None:
        event, number = tell.event, follower.member.number
        if self._job is None and not isinstance(event, Report | Acknowledge | Leave):
            self._early.append((number, tell))
            return None
        match event:
            case Report():
                if follower.report is None:
                    follower.report = event
                    return self._acknowledge(number, event.view)
            case Acknowledge():
                return self._acknowledge(number, event.view)
            case Leave():
                return self._drop(follower, f"left: {event.reason}")
            case ev.HookEnded():
                return self._run(ev.HookEnded(event.exit_code, number))
            case ev.Opened():
                return self._run(ev.Opened(number, event.epoch))
            case ev.WorkerEvent():
                if self._holds(number, event):
                    return self._run(event)
        return None

    def _acknowledge(self, number: int, view: tuple[int, int]) -> Role | None:
        follower = self._followers[number]
        if view == self._views.proposed.id:
            self._acknowledged.add(number)
        elif follower.report is not None and follower.report.view == view:
            # It followed an earlier proposal, which it can only have been sent as a Lead.
            self._order(follower, Propose(ViewChange.between(self._views.agreed, self._views.proposed)), self._memory())
        return self._settle()

    def _beat(self) -> None:
        context = self.context
        self._next_beat = context.now + context.config.heartbeat_interval
        memory = self._news()
        for number, follower in self._followers.items():
            if follower.report is None:
                self._send_lead(follower)
            beat = Beat(self.term, number, follower.link.sent, follower.link.received, memory)
            context.send(follower.member.address, beat)
        held = {member.address for member in self._wanted.values()}
        for seed in context.config.seeds:
            if seed not in held:  # somebody may have been started again there, and think that he is the first
                context.send(seed, Redirect(context.config.address))
