"""A member that does not lead: it carries out what its controller orders."""

from __future__ import annotations

from ..job import commands as cmd
from ..job import events as ev
from .becoming import BecomeCandidate, BecomeFollower, BecomeJoining, Next
from .following import follow
from .link import Link
from .members import Configurations
from .messages import (
    Acknowledge,
    Ended,
    Heartbeat,
    Join,
    Lead,
    Leave,
    Order,
    PeerMessage,
    Propose,
    Redirect,
    Release,
    RequestVote,
    Settled,
    Tell,
    Told,
    Vote,
    number_in,
)
from .roles import Context, Role


class Follower(Role):
    """Under the controller of a term."""

    def __init__(self, context: Context, key: str, address: str, term: int, configurations: Configurations) -> None:
        super().__init__(context)
        self.leader_key, self.leader_address, self.term = key, address, term
        self._link: Link[Told, Order] = Link()
        self._heard = context.now
        self._next_heartbeat = context.now + context.config.heartbeat_interval
        context.change_configurations(configurations)
        self._number = -1 if context.number is None else context.number
        """Of the member that this agent is here, and of the link."""

    def begin(self) -> Next | None:
        self._tell(self.context.local.report(self.context.configurations.proposed.id))
        return None

    def received(self, key: str, address: str, message: PeerMessage) -> Next | None:
        context = self.context
        match message:
            case Join():
                context.send(address, Redirect(self.leader_address))
                return None
            case RequestVote():
                context.send(address, Vote(message.term, message.pre, granted=False, leader=self.leader_address))
                return None
            case Lead() if message.term == self.term and key == self.leader_key:
                return self._take(message)
            case Lead():
                return follow(context, key, address, message)
        if key != self.leader_key or not isinstance(message, Order | Heartbeat | Release):
            return None
        if (message.term, message.link) != (self.term, self._number):
            return None
        match message:
            case Order():
                self._heard = context.now
                self._link.confirm(message.received)
                for order in self._link.receive(message.serial, message):
                    self._obey(order)
            case Heartbeat():
                self._heard = context.now
                context.local.remember(message.memory)
                self._link.confirm(message.received)
                for serial, event in self._link.overdue(context.now):
                    self._send(serial, event)
                if self._link.must_ask(message.sent, context.now):
                    self._heartbeat()
            case Release():
                if message.removed:
                    context.note("removed", by=address, reason=message.reason)
                    context.kill_workers(message.reason)
                    return BecomeJoining((address,))
                return BecomeCandidate(self.leader_key, message.reason)
        return None

    def closed(self, address: str, key: str) -> Next | None:
        if address == self.leader_address and key in ("", self.leader_key):
            return BecomeCandidate(self.leader_key, "closed its connection")
        return None

    def happened(self, event: ev.Event) -> Next | None:
        match event:
            case ev.WorkerEvent():
                self._tell(event)
            case ev.HookEnded():
                assert self.context.number is not None
                self._tell(ev.HookEnded(event.exit_code, self.context.number))
        return None

    def leave(self, reason: str) -> None:
        self._tell(Leave(reason))

    def tick(self) -> Next | None:
        context = self.context
        if context.now >= self._heard + context.config.heartbeat_limit:
            return BecomeCandidate(self.leader_key, f"was silent for {context.config.heartbeat_limit:g} s")
        if context.now >= self._next_heartbeat:
            self._heartbeat()
        return None

    def next_deadline(self) -> float | None:
        return min(self._heard + self.context.config.heartbeat_limit, self._next_heartbeat)

    def _take(self, lead: Lead) -> Next | None:
        """The controller of this term says again what it proposes."""
        configurations = lead.configurations or self.context.configurations.changed(lead.change)
        if configurations is None or configurations.proposed.id <= self.context.configurations.proposed.id:
            return None
        self.context.local.remember(lead.memory)
        member = configurations.find(self.context.config.key)
        if member is not None and member.number != self._number:
            return BecomeFollower(self.leader_key, self.leader_address, self.term, configurations)
        self.context.change_configurations(configurations)
        self._tell(Acknowledge(configurations.proposed.id))
        return None

    def _heartbeat(self) -> None:
        self._next_heartbeat = self.context.now + self.context.config.heartbeat_interval
        beat = Heartbeat(self.term, self._number, self._link.sent, self._link.received)
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
                configurations = context.configurations.changed(command.change)
                if configurations is not None:
                    context.change_configurations(configurations)
                    self._tell(Acknowledge(configurations.proposed.id))
            case Settled():
                context.configurations = context.configurations.settled(command.configuration)
            case cmd.End():
                self._heartbeat()  # so that the controller need not wait for the next one
                context.actions.append(Ended(command))
            case _:
                context.execute(command, (self.term, order.serial))
                number = number_in(command)
                if number is not None and context.number is not None:
                    self._tell(ev.Opened(context.number, number))
