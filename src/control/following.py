"""A member that does not lead: it carries out what its controller orders."""

from __future__ import annotations

from . import commands as cmd
from . import events as ev
from .leaderless import Leaderless
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


def follow(context: Context, key: str, address: str, lead: Lead) -> Role | None:
    """Somebody leads: accepted if no later term was voted for, and no later membership is known here.

    It is this job, or the incarnation that a majority has made of it.
    """
    if lead.term < context.term or (lead.term == context.term and context.voted != key):
        return None
    views = lead.views
    if views is None and lead.job == context.job:
        views = context.views.changed(lead.change)
    if views is None:
        context.send(address, Hold())
        return None
    if context.job not in (views.proposed.founder, views.proposed.succeeds):
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
