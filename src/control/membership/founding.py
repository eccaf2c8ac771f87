"""At the rendezvous endpoint: an agent founds the job with those who ask to be let in."""

from __future__ import annotations

from ..job import commands as cmd
from .admission import join_of, tell_difference, why_refused
from .becoming import BecomeJoining, BecomeLeader, Next
from .following import follow_anew
from .members import Configuration, Configurations, Member
from .messages import Ended, Hold, Join, Lead, PeerMessage, Redirect, Refuse, RequestVote
from .patience import Patience
from .roles import Context, Role
from .voting import answer

_ASK_EVERY_S = 1.0
_VOTED_S = 1.0
"""So long after a vote of an agent that would found a job, its candidate may come and lead it."""


class Founding(Role):
    """At the endpoint: collects the nodes of a new job, unless it hears of one that exists already.

    A deputy goes on asking at the seeds before its own, and leaves the founding to who answers there.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        context.attempt += 1
        own = join_of(context)
        self._joins: dict[str, Join] = {own.key: own}
        self._at: dict[str, str] = {}
        """The keys of the others, by address."""
        self._deadline = context.now + context.config.join_timeout
        self._last_call: float | None = None
        seeds, own_address = context.config.seeds, context.config.address
        self._before = seeds[: seeds.index(own_address)] if own_address in seeds else ()
        self._next = context.now
        self._patience = Patience(context)
        self._voted_until = context.now
        """Until then it may be that the job goes on, with this agent instead of a member."""

    def begin(self) -> Next | None:
        return self.tick()

    def received(self, key: str, address: str, message: PeerMessage) -> Next | None:
        context = self.context
        match message:
            case RequestVote():
                if answer(context, key, address, message, join_of(context)) and not message.pre:
                    self._voted_until = context.now + _VOTED_S
            case Lead():
                return follow_anew(context, key, address, message)
            case Join():
                reason = why_refused(context, message)
                if reason:
                    context.send(address, Refuse(reason))
                    return None
                other = self._at.get(message.address, message.key)
                if other != message.key:
                    del self._joins[other]  # an agent was started again at the same address
                if message.key not in self._joins:
                    tell_difference(context, message)
                self._joins[message.key], self._at[message.address] = message, message.key
                context.send(address, Hold())
                return self._consider()
            case Redirect() if message.address != context.config.address:
                return self._leave_it_to(message.address)
            case Hold() if address in self._before:
                return self._leave_it_to(address)
        return None

    def _leave_it_to(self, address: str) -> Next:
        """The job is, or will be, there."""
        for join in self._joins.values():
            if join.key != self.context.config.key:
                self.context.send(join.address, Redirect(address))
        return BecomeJoining((address,))

    def closed(self, address: str, key: str) -> Next | None:
        there = self._at.get(address)
        if there is not None and key in ("", there):
            del self._joins[there], self._at[address]
        return self._consider()

    def tick(self) -> Next | None:
        context = self.context
        too_few = len(self._joins) < context.config.job.min_nodes or not self._may_found()
        if context.now >= self._deadline and too_few:
            found = f"{len(self._joins)} of {context.config.job.min_nodes} nodes"
            if len(self._joins) >= context.config.job.min_nodes:
                found = f"{found}, and no majority of the job that this node was in,"
            reason = f"only {found} came within {context.config.join_timeout:g} s (--rdzv-conf join_timeout)"
            for join in self._joins.values():
                if join.key != context.config.key:
                    context.send(join.address, Refuse(reason))
            context.actions.append(Ended(cmd.End(cmd.EXIT_FAILED, reason)))
            return None
        if context.now >= self._next:
            self._next = context.now + _ASK_EVERY_S
            for seed in self._before:
                context.send(seed, join_of(context))
        here = f"{len(self._joins)} of {context.config.job.min_nodes}"
        self._patience.explain(context, until="others join", nodes=here, asks=",".join(self._before) or None)
        return self._consider()

    def next_deadline(self) -> float | None:
        dues = [self._deadline, self._patience.due]
        if self._last_call is not None:
            dues.append(self._last_call)
        if self._voted_until > self.context.now:
            dues.append(self._voted_until)
        if self._before:
            dues.append(self._next)
        return min(dues)

    def _consider(self) -> Next | None:
        context, count = self.context, len(self._joins)
        if count < context.config.job.min_nodes or not self._may_found():
            self._last_call = None
            return None
        if self._last_call is None:
            self._last_call = context.now + context.config.last_call_timeout
        if count < context.config.job.max_nodes and context.now < self._last_call:
            return None
        arrival = {key: number for number, key in enumerate(self._joins)}
        ordered = sorted(self._joins.values(), key=lambda join: (join.order < 0, join.order, arrival[join.key]))
        members = tuple(
            Member(number, join.key, join.host, join.address, join.workers, join.role)
            for number, join in enumerate(ordered)
        )
        term = max(context.term, *(join.term for join in ordered))
        context.pledge(term + 1, context.config.key)
        configuration = Configuration(context.term, 0, members, len(members), f"{context.config.key}.{context.attempt}")
        configurations = Configurations(configuration, configuration)
        return BecomeLeader(context.term, configurations, founds=True, joins=dict(self._joins))

    def _may_found(self) -> bool:
        """Not while a vote of this agent may count, nor, for one that was in a job, against a majority of that."""
        context = self.context
        if context.now < self._voted_until:
            return False
        if not context.job:
            return True
        configurations, there = context.configurations, set(context.configurations.numbers_of(self._joins))
        for join in self._joins.values():
            there |= configurations.replaced_by(join.key, join.host, join.address)
        return configurations.has_quorum(there, context.config.min_quorum)
