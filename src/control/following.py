"""A member that does not lead: it carries out what its controller orders, and finds another when that one is lost."""

from __future__ import annotations

from . import commands as cmd
from . import events as ev
from .link import Link
from .members import Views
from .messages import (
    Acknowledge,
    Beat,
    Claim,
    Ended,
    Hold,
    Join,
    Lead,
    Leave,
    Order,
    Ordered,
    PeerMessage,
    Propose,
    Redirect,
    Release,
    Settled,
    Tell,
    Told,
    Vote,
)
from .roles import Context, Role
from .seeking import Seeking

_STAND_AGAIN_S = 0.1
_STAND_AFTER_LOWER_S = 0.05
_LATER_AT_MOST_S = 1.0
_ANSWER_S = 1.0
"""From a claim to its last vote."""


class Following(Role):
    """Under the controller of a term."""

    def __init__(self, context: Context, key: str, address: str, term: int, views: Views) -> None:
        super().__init__(context)
        self.leader_key, self.leader_address, self.term = key, address, term
        self._link: Link[Told, Order] = Link()
        self._heard = context.now
        self._next_beat = context.now + context.config.heartbeat_interval
        context.change_views(views)
        self._number = -1 if context.number is None else context.number
        """Of the member that this agent is here, and of the link."""

    def begin(self) -> Role | None:
        self._tell(self.context.local.report(self.context.views.proposed.id))
        return None

    def received(self, key: str, address: str, message: PeerMessage) -> Role | None:
        context = self.context
        match message:
            case Join():
                context.send(address, Redirect(self.leader_address))
                return None
            case Claim():
                context.send(address, Vote(message.term, message.real, granted=False, leader=self.leader_address))
                return None
            case Lead() if message.term == self.term and key == self.leader_key:
                return self._take(message)
            case Lead():
                return follow(context, key, address, message)
        if key != self.leader_key or not isinstance(message, Order | Beat | Release):
            return None
        if (message.term, message.link) != (self.term, self._number):
            return None
        match message:
            case Order():
                self._heard = context.now
                self._link.confirm(message.received)
                for order in self._link.receive(message.serial, message):
                    self._obey(order)
            case Beat():
                self._heard = context.now
                context.local.remember(message.memory)
                self._link.confirm(message.received)
                for serial, event in self._link.overdue(context.now):
                    self._send(serial, event)
                if self._link.must_ask(message.sent, context.now):
                    self._beat()
            case Release():
                if message.removed:
                    context.note("removed", by=address, reason=message.reason)
                    context.kill_workers(message.reason)
                    return Seeking(context, (address,))
                return Leaderless(context, self.leader_key, message.reason)
        return None

    def closed(self, address: str, key: str) -> Role | None:
        if address == self.leader_address and key in ("", self.leader_key):
            return Leaderless(self.context, self.leader_key, "closed its connection")
        return None

    def happened(self, event: ev.Event) -> Role | None:
        match event:
            case ev.WorkerEvent():
                self._tell(event)
            case ev.HookEnded():
                assert self.context.number is not None
                self._tell(ev.HookEnded(event.exit_code, self.context.number))
        return None

    def leave(self, reason: str) -> None:
        self._tell(Leave(reason))

    def tick(self) -> Role | None:
        context = self.context
        if context.now >= self._heard + context.config.heartbeat_limit:
            return Leaderless(context, self.leader_key, f"was silent for {context.config.heartbeat_limit:g} s")
        if context.now >= self._next_beat:
            self._beat()
        return None

    def next_deadline(self) -> float | None:
        return min(self._heard + self.context.config.heartbeat_limit, self._next_beat)

    def _take(self, lead: Lead) -> Role | None:
        """The controller of this term says again what it proposes."""
        views = lead.views or self.context.views.changed(lead.change)
        if views is None or views.proposed.id <= self.context.views.proposed.id:
            return None
        self.context.local.remember(lead.memory)
        member = views.find(self.context.config.key)
        if member is not None and member.number != self._number:
            return Following(self.context, self.leader_key, self.leader_address, self.term, views)
        self.context.change_views(views)
        self._tell(Acknowledge(views.proposed.id))
        return None

    def _beat(self) -> None:
        self._next_beat = self.context.now + self.context.config.heartbeat_interval
        beat = Beat(self.term, self._number, self._link.sent, self._link.received)
        self.context.send(self.leader_address, beat)

    def _tell(self, event: Told) -> None:
        serial = self._link.send(event, self.context.now)
        self._send(serial, event)

    def _send(self, serial: int, event: Told) -> None:
        tell = Tell(self.term, self._number, serial, self._link.received, event)
        self.context.send(self.leader_address, tell)

    def _obey(self, order: Order) -> None:
        context, command = self.context, order.command
        context.local.remember(order.memory)
        match command:
            case Propose():
                views = context.views.changed(command.change)
                if views is not None:
                    context.change_views(views)
                    self._tell(Acknowledge(views.proposed.id))
            case Settled():
                context.views = context.views.settled(command.view)
            case cmd.End():
                self._beat()  # so that the controller need not wait for the next one
                context.actions.append(Ended(command))
            case _:
                context.execute(command, (self.term, order.serial))
                number = number_in(command)
                if number is not None and context.number is not None:
                    self._tell(ev.Opened(context.number, number))


class Leaderless(Role):
    """The controller is lost: the lowest member that a quorum votes for is the next.

    Who finds no majority for as long as the others may take to do without it stops its workers, and goes on trying.
    """

    def __init__(self, context: Context, lost: str, reason: str, *, stranded: bool = False) -> None:
        super().__init__(context)
        self._lost = lost
        self._reason = reason
        self._closed: set[str] = set()
        self._stranded = stranded
        limit = context.config.heartbeat_limit
        self._strand_due = context.now + limit
        self._deadline = context.now + context.config.join_timeout
        self._seek: tuple[float, str] | None = None
        self._claim: Claim | None = None
        self._votes: set[int] = set()
        self._asked = context.now
        self._stand_at = context.now + self._patience()

    def begin(self) -> Role | None:
        members = self.context.views.everybody().values()
        lost = next((member.host for member in members if member.key == self._lost), self._lost)
        if not self._stranded:
            self.context.note("controller-lost", node=lost, reason=self._reason)
        return self.tick()

    def received(self, key: str, address: str, message: PeerMessage) -> Role | None:
        context = self.context
        match message:
            case Lead():
                return follow(context, key, address, message)
            case Claim():
                self._answer(key, address, message)
            case Vote() if self._claim is not None and message.term == self._claim.term:
                return self._count(key, message)
            case Redirect() if self._seek is None:
                self._seek = (context.now + _ANSWER_S, message.address)
            case Join() if self._stranded:
                context.send(address, Hold())
        return None

    def closed(self, address: str, key: str) -> Role | None:
        """One less to wait for: perhaps it is this node's turn."""
        self._closed.add(address)
        if self._claim is None:
            self._stand_at = min(self._stand_at, self._asked + self._patience())
        return None

    def tick(self) -> Role | None:
        context = self.context
        if context.now >= self._deadline:
            limit = f"{context.config.join_timeout:g} s"
            reason = f"no majority of the {len(context.views.agreed.members)} nodes was there for {limit}"
            context.actions.append(Ended(cmd.End(cmd.EXIT_FAILED, reason)))
            return None
        if self._seek is not None and context.now >= self._seek[0]:
            return self._give_up(self._seek[1])
        if not self._stranded and context.now >= self._strand_due:
            self._strand()
        if context.now >= self._stand_at:
            return self._stand()
        return None

    def next_deadline(self) -> float | None:
        dues = [self._deadline, self._stand_at]
        if not self._stranded:
            dues.append(self._strand_due)
        if self._seek is not None:
            dues.append(self._seek[0])
        return min(dues)

    def _patience(self) -> float:
        """Lower members stand first."""
        context = self.context
        lower = [
            member
            for member in context.views.proposed.members
            if context.number is not None
            and member.number < context.number
            and member.key != self._lost
            and member.address not in self._closed
        ]
        return min(_LATER_AT_MOST_S, _STAND_AFTER_LOWER_S * len(lower))

    def _stand(self) -> Role | None:
        """Ask whether there would be votes; a candidate that nobody wants changes nobody's term."""
        self._claim = Claim(self.context.term + 1, self.context.views.proposed.id, real=False)
        return self._ask()

    def _ask(self) -> Role | None:
        context = self.context
        assert self._claim is not None
        self._votes = set() if context.number is None else {context.number}
        self._asked = context.now
        again = _ANSWER_S if self._stranded or self._claim.real else _STAND_AGAIN_S
        self._stand_at = context.now + again + self._patience()
        for member in context.views.everybody().values():
            if member.key != context.config.key:
                context.send(member.address, self._claim)
        return self._decide()

    def _count(self, key: str, vote: Vote) -> Role | None:
        context = self.context
        assert self._claim is not None
        if vote.real != self._claim.real:
            return None
        if not vote.granted:
            if vote.leader and vote.leader != context.config.address:
                old = next((m.address for m in context.views.everybody().values() if m.key == self._lost), "")
                wait = self._strand_due - context.now if vote.leader == old else _ANSWER_S
                if self._seek is None:
                    self._seek = (context.now + max(_ANSWER_S, wait), vote.leader)
            return None
        self._votes |= {member.number for member in context.views.everybody().values() if member.key == key}
        return self._decide()

    def _decide(self) -> Role | None:
        context = self.context
        assert self._claim is not None
        if not context.views.has_quorum(self._votes, context.config.min_quorum):
            return None
        if not self._claim.real:
            context.pledge(self._claim.term, context.config.key)
            self._claim = Claim(self._claim.term, self._claim.view, real=True)
            return self._ask()
        from .leading import Leading

        lost = None
        for member in context.views.everybody().values():
            if member.key == self._lost and member.number not in self._votes:
                lost = member
        return Leading(context, self._claim.term, context.views, lost=lost, reason=self._reason)

    def _answer(self, key: str, address: str, claim: Claim) -> None:
        context = self.context
        known = any(member.key == key for member in context.views.everybody().values())
        granted = known and claim.view >= context.views.proposed.id
        if claim.real:
            granted = granted and (claim.term > context.term or (claim.term == context.term and context.voted == key))
            if granted:
                context.pledge(claim.term, key)
                self._claim = None
                self._stand_at = max(self._stand_at, context.now + _ANSWER_S)
        else:
            granted = granted and claim.term > context.term
        context.send(address, Vote(claim.term, claim.real, granted))

    def _strand(self) -> None:
        context = self.context
        self._stranded = True
        agreed = context.views.agreed
        needed = agreed.quorum(context.config.min_quorum)
        found = f"{len(self._votes)} of {len(agreed.members)} nodes, {needed} are needed"
        hint = " (--min-nodes 1 would let one go on alone)" if len(agreed.members) == 2 else ""
        reason = f"no majority: {found}{hint}"
        context.note("minority", found=found, lost=self._reason)
        context.kill_workers(reason)

    def _give_up(self, leader: str) -> Role:
        """The others have a controller, and this node is not one of them any more."""
        reason = "the job goes on without this node"
        self.context.note("removed", leader=leader, reason=reason)
        self.context.kill_workers(reason)
        return Seeking(self.context, (leader,))


def follow(context: Context, key: str, address: str, lead: Lead) -> Role | None:
    """Somebody leads: accepted if no later term was voted for, and no later membership is known here."""
    if lead.term < context.term or (lead.term == context.term and context.voted != key):
        return None
    views = lead.views or context.views.changed(lead.change)
    if views is None:
        context.send(address, Hold())
        return None
    if views.proposed.id <= context.views.proposed.id:
        return None
    if views.proposed.find(context.config.key) is None:
        return None
    context.pledge(lead.term, key)
    context.local.remember(lead.memory)
    return Following(context, key, address, lead.term, views)


def number_in(command: Ordered) -> int | None:
    """The epoch number that a command makes known, which its receiver confirms."""
    match command:
        case cmd.OpenEpoch():
            return command.epoch
        case cmd.FailEpoch():
            return command.next_epoch
    return None
