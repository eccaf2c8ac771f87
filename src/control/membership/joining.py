"""Before an agent is a member: it looks for the job."""

from __future__ import annotations

from ..job import commands as cmd
from .admission import join_of
from .becoming import BecomeFounding, Next
from .following import follow_anew
from .members import Configurations
from .messages import Ended, Hold, Join, Lead, Members, PeerMessage, Redirect, Refuse, RequestVote
from .patience import Patience
from .roles import Context, Role
from .voting import answer

_ASK_EVERY_S = 1.0
_ASK_AGAIN_S = 0.1
_QUICK_TRIES = 100
_ASKED_AT_ONCE = 8


class Joining(Role):
    """Asks at the seeds, and wherever they send it, until somebody leads it."""

    def __init__(self, context: Context, first: tuple[str, ...] = ()) -> None:
        super().__init__(context)
        context.attempt += 1
        context.number = None
        known = [member.address for member in context.configurations.everybody().values()]
        addresses = [*first, *context.config.seeds, *known]
        self._addresses = [a for a in dict.fromkeys(addresses) if a != context.config.address]
        self._asked: dict[str, float] = {}
        self._next = context.now
        self._deadline = context.now + context.config.join_timeout
        self._held = False
        self._refused = 0
        self._answered = context.now
        """When somebody last did; or the beginning."""
        self._patience = Patience(context)
        self._founds_after = context.config.deputy
        if context.config.founder:
            self._founds_after = context.config.heartbeat_limit

    def begin(self) -> Next | None:
        self.context.local.forget()
        self.context.actions.append(Members(Configurations(), None))  # nothing more is asked of the other stores
        return self.tick()

    def received(self, key: str, address: str, message: PeerMessage) -> Next | None:
        context = self.context
        if not isinstance(message, Join | RequestVote):
            self._answered = context.now
        match message:
            case Lead():
                return follow_anew(context, key, address, message)
            case Redirect():
                if message.address != context.config.address:
                    self._addresses = [message.address, *(a for a in self._addresses if a != message.address)]
                    self._ask(message.address, again_after=0.2)
            case Refuse():
                end = cmd.End(cmd.EXIT_FAILED, f"the job at {address} refuses this node: {message.reason}")
                context.actions.append(Ended(end))
            case Hold() if not self._held:
                self._held = True
                context.note("joined", at=address, waits="for the others")
            case RequestVote():
                answer(context, key, address, message, join_of(context))
        return None

    def closed(self, address: str, key: str) -> Next | None:
        """Nobody there, or not yet: agents that are started together find each other quickly."""
        if address in self._addresses and self._refused < _QUICK_TRIES:
            self._refused += 1
            self._next = min(self._next, self.context.now + _ASK_AGAIN_S)
        return None

    def tick(self) -> Next | None:
        context = self.context
        if context.now >= self._deadline:
            where = ", ".join(self._addresses[:3]) or "any endpoint"
            waited = f"{context.config.join_timeout:g} s"
            reason = f"no job could be joined at {where} within {waited} (--rdzv-conf join_timeout)"
            context.actions.append(Ended(cmd.End(cmd.EXIT_FAILED, reason)))
        elif self._founds_after is not None and context.now >= self._answered + self._founds_after:
            return BecomeFounding()
        elif context.now >= self._next:
            for address in self._addresses[:_ASKED_AT_ONCE]:
                self._ask(address)
            self._addresses = [*self._addresses[_ASKED_AT_ONCE:], *self._addresses[:_ASKED_AT_ONCE]]
            self._next = context.now + _ASK_EVERY_S
        looks_for = ",".join(self._addresses[:_ASKED_AT_ONCE]) or None
        self._patience.explain(context, until="others join, too" if self._held else "it is answered", asks=looks_for)
        return None

    def next_deadline(self) -> float | None:
        dues = [self._next, self._deadline, self._patience.due]
        if self._founds_after is not None:
            dues.append(self._answered + self._founds_after)
        return min(dues)

    def _ask(self, address: str, again_after: float = 0.0) -> None:
        context = self.context
        if context.now >= self._asked.get(address, -1e9) + again_after:
            self._asked[address] = context.now
            context.send(address, join_of(context))
