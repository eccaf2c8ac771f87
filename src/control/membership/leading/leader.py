"""The controller's role: who is there, who joins, who is lost, and the deadlines of a term."""

from __future__ import annotations

from ...job import commands as cmd
from ...job import events as ev
from ..admission import tell_difference, why_refused
from ..becoming import BecomeCandidate, BecomeFounding, BecomeLeader, Next
from ..following import follow
from ..members import Configurations, Member
from ..messages import (
    Acknowledge,
    Heartbeat,
    Hold,
    Join,
    Lead,
    Leave,
    PeerMessage,
    Redirect,
    Refuse,
    Release,
    Report,
    RequestVote,
    Tell,
    Vote,
)
from ..roles import Context
from .directing import Progress
from .proposing import Proposing

_CALLED_BACK = 64
"""Of so many lost members it is tried whether they are there again, also where no seed is left to send them here."""


class Leader(Proposing):
    """One term."""

    def __init__(self, context: Context, elected: BecomeLeader) -> None:
        super().__init__(context, elected)
        self._joins = elected.joins
        """Of those who have just come into the job: they know nothing of it."""
        self._next_heartbeat = context.now + context.config.heartbeat_interval
        self._deadline = context.now + context.config.join_timeout

    # ---- the role ------------------------------------------------------------------------------------------------

    def begin(self) -> Next | None:
        context = self.context
        wanted = self._proposal.wanted
        for member in self._proposal.configurations.everybody().values():
            if member.key != context.config.key and member.number in wanted:
                join = (self._joins or {}).get(member.key)
                follower = Progress(member, context.now, join.attempt if join else 0)
                follower.needs_configurations = self._joins is not None
                self._add(follower)
        if self._founding is not None:
            self._epochs = {m.number: self._founding[m.key].epoch for m in wanted.values()}
        context.note("leads", term=self.term, nodes=len(wanted), reason=self._reason or None)
        return self._propose()

    def received(self, key: str, address: str, message: PeerMessage) -> Next | None:
        context = self.context
        match message:
            case Join():
                return self._join(key, address, message)
            case RequestVote():
                context.send(address, Vote(message.term, message.pre, granted=False, leader=context.config.address))
                return None
            case Lead() if message.term > self.term and self._job is None:
                return follow(context, key, address, message)
        follower = self._by_key.get(key)
        if follower is None:
            if isinstance(message, Tell | Heartbeat) and message.term <= self.term:
                context.send(address, Release(message.term, message.link, "it is no member any more", removed=True))
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
        for follower in self._at.get(address, ()):
            if key in ("", follower.member.key):
                return self._drop(follower, "closed its connection")
        return None

    def happened(self, event: ev.Event) -> Next | None:
        match event:
            case ev.WorkerEvent():
                self._run(event)
            case ev.HookEnded() if self.context.number is not None:
                self._run(ev.HookEnded(event.exit_code, self.context.number))
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
        if self._propose_due is not None and context.now >= self._propose_due:
            becomes = self._propose()
            if becomes is not None:
                return becomes
        if self._job_due is not None and context.now >= self._job_due:
            self._run(ev.TimePassed())
        return None

    def next_deadline(self) -> float | None:
        dues = [self._next_heartbeat, self._liveness.due]
        if self._propose_due is not None:
            dues.append(self._propose_due)
        if self._job is None and self._end is None:
            dues.append(self._deadline)
        if self._job_due is not None:
            dues.append(self._job_due)
        if self._end is not None:
            dues.append(self._end_due)
        return min(dues)

    def _drop_the_silent(self) -> Next | None:
        liveness, now = self._liveness, self.context.now
        silent = liveness.silent(self._followers.values(), now)
        for follower in silent:
            becomes = self._drop(follower, f"was silent for {liveness.limit(follower):g} s", silent=True)
            if becomes is not None:
                return becomes
        if now >= liveness.due:
            liveness.look_again(self._followers.values(), now)
        return None

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
        for other in dict.fromkeys([*self._at.get(address, ()), *([] if known is None else [known])]):
            reason = "began anew" if other is known else "was started again at its address"
            becomes = self._drop(other, reason, is_back=other is known)
            if becomes is not None:
                return becomes
        number = self._proposal.new_number()
        member = Member(number, key, join.host, address, join.workers, join.role)
        follower = Progress(member, context.now, join.attempt)
        follower.needs_configurations = True
        self._add(follower)
        self._proposal.add(member)
        self._epochs[number] = join.epoch
        tell_difference(context, join)
        context.note("node-joins", node=number, host=join.host, address=address)
        context.send(address, Hold())
        self._propose_soon()
        return None

    def _is_promised(self, join: Join) -> bool:
        """To a candidate of a later term, who was not elected."""
        if join.job != self._proposal.configurations.proposed.founder:
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
        """A member is lost. `is_back`: its workers, too, but its agent is there, and asks to be another member.

        `silent`: it may be cut off and alive, and the others go on without this node.
        """
        context, member = self.context, follower.member
        self._remove(follower)
        is_led = self._proposal.remove(member, is_back=is_back)
        context.send(member.address, Release(self.term, member.number, reason, removed=True))
        context.note("node-lost", node=member.number, host=member.host, reason=reason)
        if self._end is not None:
            self._finish_ending()
            return None
        if self._founding is not None:
            return self._form_again()
        if not is_led:
            return self._step_down(at_once=silent)
        if self._job is not None:
            self._run(ev.NodeLost(member.number, f"node {member.number} ({member.host}) {reason}"))
        self._propose_soon()
        return None

    def _step_down(self, *, at_once: bool) -> Next:
        """`at_once`: the others may have begun to go on without this node, whose workers are stopped.

        Where an agent has died, it can be started again; what the workers here hold is kept for that, a short time.
        """
        context = self.context
        agreed = self._proposal.configurations.agreed
        present = sum(member.key in self._by_key or member.key == context.config.key for member in agreed.members)
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

    def _told(self, follower: Progress, tell: Tell) -> Next | None:
        event, number = tell.event, follower.member.number
        if self._job is None and not isinstance(event, Report | Acknowledge | Leave):
            self._early.append((number, tell))
            return None
        match event:
            case Report():
                return self._reports(follower, event)
            case Acknowledge():
                return self._acknowledges(follower, event.configuration)
            case Leave():
                return self._drop(follower, f"left: {event.reason}")
            case ev.HookEnded():
                self._run(ev.HookEnded(event.exit_code, number))
            case ev.Opened():
                self._run(ev.Opened(number, event.epoch))
            case ev.WorkerEvent() if self._holds(number, event):
                self._run(event)
        return None

    def _heartbeat(self) -> None:
        context = self.context
        self._next_heartbeat = context.now + context.config.heartbeat_interval
        memory = self._news()
        for number, follower in self._followers.items():
            if follower.report is None and self._propose_due is None:
                self._send_lead(follower)
            beat = Heartbeat(self.term, number, follower.link.sent, follower.link.received, memory)
            context.send(follower.member.address, beat)
        held = {member.address for member in self._proposal.wanted.values()}
        absent = [address for address in context.met if address not in held]
        for address in dict.fromkeys([*context.config.seeds, *absent[-_CALLED_BACK:]]):
            if address not in held:  # somebody may have been started again there, and know nobody or think he is first
                context.send(address, Redirect(context.config.address))
