"""Members whose agents were started again: how a majority of which some have forgotten everything goes on. Pure.

Such an agent does not know what it has voted for and confirmed: it is no member any more, and its vote says nothing
about what the job has decided. But it can replace the member that it was. If those who remember and those who replace
others stand for a majority of the members, they begin the next incarnation of the job: the same membership with these
agents in it, under another name, with terms and epochs of its own. So nothing that was said, begun or promised
in the one before can be taken for something of this one, and whoever is still in it finds no majority there.

It is not done while a majority of those who remember may come: they would go on with what runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

from .admission import why_refused
from .members import Configuration, Configurations, Member
from .messages import Join
from .roles import Context


class Restarted:
    """The agents in no job that are where members have been, as one candidate knows them."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._joins: dict[str, Join] = {}
        self._at: dict[str, str] = {}
        """Their keys, by address."""

    @property
    def addresses(self) -> list[str]:
        return list(self._at)

    def joins(self, keys: Iterable[str]) -> dict[str, Join]:
        return {key: self._joins[key] for key in keys if key in self._joins}

    def note(self, join: Join) -> bool:
        """Whether this agent can replace a member."""
        configurations = self._context.configurations
        if why_refused(self._context, join) or configurations.find(join.key) is not None:
            return False  # a member says itself what it knows
        if not configurations.replaced_by(join.key, join.host, join.address):
            return False
        self.closed(join.address, "")
        if join.key in self._joins:
            self.closed(self._joins[join.key].address, "")
        self._joins[join.key], self._at[join.address] = join, join.key
        return True

    def closed(self, address: str, key: str) -> None:
        there = self._at.get(address)
        if there is not None and key in ("", there):
            del self._joins[there], self._at[address]

    def replaces(self, key: str) -> set[int]:
        """The numbers of the members that this agent replaces. Also one that is a member by now, if not yet in the
        membership that was agreed on last."""
        agent = self._agent(key)
        if agent is None:
            return set()
        return self._context.configurations.replaced_by(key, agent.host, agent.address)

    def _agent(self, key: str) -> Join | Member | None:
        return self._joins.get(key) or self._context.configurations.find(key)

    def replaced(self, votes: Iterable[str], voters: Set[int]) -> dict[str, set[int]]:
        """By key of those who have voted: the members that they replace, none of whom votes itself."""
        replaced: dict[str, set[int]] = {}
        left = set(self._context.configurations.everybody()) - voters
        for key in sorted(votes):
            numbers = self.replaces(key) & left
            if numbers:
                replaced[key] = numbers
                left -= numbers
        return replaced

    def no_others_can_come(self, replaced: Mapping[str, Set[int]]) -> bool:
        """Too many members are certainly gone, since another agent is at their address."""
        configurations = self._context.configurations
        at = {agent.address: key for key in replaced if (agent := self._agent(key)) is not None}
        left = {
            n for n, member in configurations.everybody().items() if at.get(member.address, member.key) == member.key
        }
        return not configurations.has_quorum(left, self._context.config.min_quorum)

    def next_incarnation(self, replaced: Mapping[str, Set[int]], term: int) -> Configurations:
        """The same membership with these agents instead of those; who is not there is still a member, to be missed."""
        context, configurations = self._context, self._context.configurations
        name = f"{context.config.key}.{context.attempt}.{term}"
        number = max(configuration.next_number for configuration in (configurations.agreed, configurations.proposed))
        new: dict[int, Member] = {}
        for key in sorted(replaced, key=lambda key: min(replaced[key])):
            member = configurations.find(key)
            if member is None:
                join = self._joins[key]
                member = Member(number, key, join.host, join.address, join.workers, join.role)
                number += 1
            new.update(dict.fromkeys(replaced[key], member))

        def renamed(configuration: Configuration) -> Configuration:
            members = dict.fromkeys(new.get(member.number, member) for member in configuration.members)
            return Configuration(term, 0, tuple(members), number, name, context.job)

        return Configurations(renamed(configurations.agreed), renamed(configurations.proposed))
