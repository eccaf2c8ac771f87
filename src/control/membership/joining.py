"""Before an agent is a member: looking for the job, or, at the rendezvous endpoint, founding it."""

from __future__ import annotations

from ..job import commands as cmd
from .identity import difference, why_another_job
from .members import Configuration, Configurations, Member
from .messages import Ended, Hold, Join, Lead, Members, PeerMessage, Redirect, Refuse, RequestVote
from .roles import Context, Role
from .voting import answer

_ASK_EVERY_S = 1.0
_ASK_AGAIN_S = 0.1
_QUICK_TRIES = 100
_ASKED_AT_ONCE = 8
_LONGEST_ROLE = 1000
_EXPLAIN_EVERY_S = 60.0
_VOTED_S = 1.0
"""So long after a vote of an agent that would found a job, its candidate may come and lead it."""
WAITS = "waits"
"""The note of who waits for the job to begin. The shell adds where it listens and what it has tried."""


class _Patience:
    """When who waits says for what: after some seconds, then more and more seldom."""

    def __init__(self, context: Context) -> None:
        self._began = context.now
        self._every = context.config.explain_after
        self.due = context.now + self._every

    def explain(self, context: Context, **fields: object) -> None:
        if context.now >= self.due:
            context.note(WAITS, seconds=round(context.now - self._began), **fields)
            self._every = min(2 * self._every, _EXPLAIN_EVERY_S)
            self.due = context.now + self._every


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
        self._patience = _Patience(context)
        self._founds_after = context.config.deputy
        if context.config.founder:
            self._founds_after = context.config.heartbeat_limit

    def begin(self) -> Role | None:
        self.context.local.forget()
        self.context.actions.append(Members(Configurations(), None))  # nothing more is asked of the other stores
        return self.tick()

    def received(self, key: str, address: str, message: PeerMessage) -> Role | None:
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

    def closed(self, address: str, key: str) -> Role | None:
        """Nobody there, or not yet: agents that are started together find each other quickly."""
        if address in self._addresses and self._refused < _QUICK_TRIES:
            self._refused += 1
            self._next = min(self._next, self.context.now + _ASK_AGAIN_S)
        return None

    def tick(self) -> Role | None:
        context = self.context
        if context.now >= self._deadline:
            where = ", ".join(self._addresses[:3]) or "any endpoint"
            waited = f"{context.config.join_timeout:g} s"
            reason = f"no job could be joined at {where} within {waited} (--rdzv-conf join_timeout)"
            context.actions.append(Ended(cmd.End(cmd.EXIT_FAILED, reason)))
        elif self._founds_after is not None and context.now >= self._answered + self._founds_after:
            return Founding(context)
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
        self._patience = _Patience(context)
        self._voted_until = context.now
        """Until then it may be that the job goes on, with this agent in the place of a member."""

    def begin(self) -> Role | None:
        return self.tick()

    def received(self, key: str, address: str, message: PeerMessage) -> Role | None:
        context = self.context
        match message:
            case RequestVote():
                if answer(context, key, address, message, join_of(context)) and message.real:
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

    def _leave_it_to(self, address: str) -> Role:
        """The job is, or will be, there."""
        for join in self._joins.values():
            if join.key != self.context.config.key:
                self.context.send(join.address, Redirect(address))
        return Joining(self.context, (address,))

    def closed(self, address: str, key: str) -> Role | None:
        there = self._at.get(address)
        if there is not None and key in ("", there):
            del self._joins[there], self._at[address]
        return self._consider()

    def tick(self) -> Role | None:
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

    def _consider(self) -> Role | None:
        context, count = self.context, len(self._joins)
        if count < context.config.job.min_nodes or not self._may_found():
            self._last_call = None
            return None
        if self._last_call is None:
            self._last_call = context.now + context.config.last_call_timeout
        if count < context.config.job.max_nodes and context.now < self._last_call:
            return None
        from .leader import Leader

        arrival = {key: number for number, key in enumerate(self._joins)}
        ordered = sorted(self._joins.values(), key=lambda join: (join.order < 0, join.order, arrival[join.key]))
        members = tuple(
            Member(number, join.key, join.host, join.address, join.workers, join.role)
            for number, join in enumerate(ordered)
        )
        term = max(context.term, *(join.term for join in ordered))
        context.pledge(term + 1, context.config.key)
        configuration = Configuration(context.term, 0, members, len(members), f"{context.config.key}.{context.attempt}")
        return Leader(context, context.term, Configurations(configuration, configuration), founding=dict(self._joins))

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


def follow_anew(context: Context, key: str, address: str, lead: Lead) -> Role | None:
    """A controller counts on an agent that is in no job."""
    if lead.configurations is None:
        voted = (context.job, context.term, context.voted)
        if (lead.job, lead.term, key) in (voted, context.promise):
            context.send(address, Hold())  # the base of its change is not known here
        return None
    if not _names(lead, context.config.key):
        return None
    from .follower import Follower

    another_job = lead.configurations.proposed.founder != context.job
    other_voted = lead.term == context.pledged == context.term and context.voted != key
    if not another_job and (lead.term < context.pledged or other_voted):
        return None  # a controller that does not know yet that it is none any more
    context.pledge(lead.term, key, another_job=another_job)
    context.local.remember(lead.memory)
    return Follower(context, key, address, lead.term, lead.configurations)


def join_of(context: Context) -> Join:
    config = context.config
    return Join(
        config.run_id,
        config.key,
        config.host,
        config.address,
        config.workers,
        config.order,
        context.local.epoch,
        context.attempt,
        config.role,
        config.identity,
        context.job,
        context.pledged,
        context.voted if context.pledged == context.term else "",
    )


def why_refused(context: Context, join: Join) -> str:
    """Why this agent can never be a member of the job; empty if it can."""
    config = context.config
    if join.version != Join.__struct_defaults__[-1]:
        return f"it runs another version of hyperpodrun (protocol {join.version})"
    if join.run_id != config.run_id:
        return f"the job here is {config.run_id!r}, not {join.run_id!r} (--rdzv-id)"
    if not 1 <= join.workers <= 4096:
        return f"{join.workers} workers on one node"
    if len(join.role) > _LONGEST_ROLE:
        return f"a role with a name of {len(join.role)} characters"
    return why_another_job(config.identity, join.identity, same_role=join.role == config.role)


def tell_difference(context: Context, join: Join) -> None:
    """A new member runs something else than this agent, and that is meant."""
    same_role = join.role == context.config.role
    found = difference(context.config.identity, join.identity, same_role=same_role)
    if found:
        context.note("node-differs", host=join.host, address=join.address, how=found)


def _names(lead: Lead, key: str) -> bool:
    return any(member.key == key for member in lead.change.added) or (
        lead.configurations is not None and lead.configurations.proposed.find(key) is not None
    )
