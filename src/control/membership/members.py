"""Who is in the job: the membership that a majority agrees on, and what a majority of it is. Pure values."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import cached_property

import msgspec


class Member(msgspec.Struct, frozen=True):
    """One agent. `number` says when it is its turn to lead, and is never given to another."""

    number: int
    key: str
    """Random, of this agent process: one that is started again is another member."""
    host: str
    address: str
    """`host:port` at which other agents reach it."""
    workers: int
    """How many ranks it can hold."""
    role: str = "default"
    """Of its workers."""


class Configuration(msgspec.Struct, frozen=True, dict=True):
    """The members as one controller proposed them; `(term, serial)` orders all configurations that there ever are."""

    term: int = 0
    serial: int = 0
    members: tuple[Member, ...] = ()
    next_number: int = 0
    founder: str = ""
    """This incarnation of the job: the agent that founded it, and in which attempt. Random, as the agent's key is:
    terms, epochs and memberships of two incarnations have nothing to do with each other."""
    succeeds: str = ""
    """The incarnation before: this one goes on with what its members know."""

    @property
    def id(self) -> tuple[int, int]:
        return self.term, self.serial

    @cached_property
    def by_key(self) -> dict[str, Member]:
        """The newest member of each key: an agent that was lost and came back is another member."""
        return {member.key: member for member in self.members}

    def find(self, key: str) -> Member | None:
        return self.by_key.get(key)

    def quorum(self, min_nodes: int | None) -> int:
        """How many of its members may act for it: more than half, or fewer where the user allows it."""
        majority = len(self.members) // 2 + 1
        return majority if min_nodes is None else min(majority, min_nodes)

    def has_quorum(self, numbers: Collection[int], min_nodes: int | None) -> bool:
        """Whether these nodes may act for this configuration."""
        return sum(member.number in numbers for member in self.members) >= self.quorum(min_nodes)


class ConfigurationChange(msgspec.Struct, frozen=True):
    """The next configuration as the difference to an agreed one: its cost does not grow with the membership."""

    base: tuple[int, int]
    id: tuple[int, int]
    removed: tuple[int, ...]
    added: tuple[Member, ...]
    next_number: int

    @classmethod
    def between(cls, base: Configuration, new: Configuration) -> ConfigurationChange:
        before, after = ({member.number for member in configuration.members} for configuration in (base, new))
        added = tuple(member for member in new.members if member.number not in before)
        return cls(base.id, new.id, tuple(sorted(before - after)), added, new.next_number)

    def apply(self, base: Configuration) -> Configuration:
        removed = frozenset(self.removed)
        kept = tuple(member for member in base.members if member.number not in removed)
        return Configuration(*self.id, (*kept, *self.added), self.next_number, base.founder, base.succeeds)


class Configurations(msgspec.Struct, frozen=True, dict=True):
    """What one agent knows of the membership: the last that was agreed on, and the last that was proposed.

    As long as they differ, both must be asked: a leader needs a quorum of each. That keeps two groups from leading
    at once while the membership changes (Raft's joint consensus, with a log of one entry).

    Who is where is looked up, and counted once: a question about one agent costs the same in every membership.
    """

    agreed: Configuration = Configuration()
    proposed: Configuration = Configuration()

    def has_quorum(self, numbers: Collection[int], min_nodes: int | None) -> bool:
        return all(configuration.has_quorum(numbers, min_nodes) for configuration in (self.agreed, self.proposed))

    def find(self, key: str) -> Member | None:
        """In either, the newest."""
        found = [
            member for configuration in (self.agreed, self.proposed) if (member := configuration.find(key)) is not None
        ]
        return max(found, key=lambda member: member.number, default=None)

    def everybody(self) -> Mapping[int, Member]:
        """All members of either, by number."""
        return self._everybody

    def numbers_of(self, keys: Iterable[str]) -> set[int]:
        """All numbers that these agents have. One that was removed and came back has two, and speaks for both."""
        numbers = self._numbers_by_key
        return {number for key in keys for number in numbers.get(key, ())}

    def replaced_by(self, key: str, host: str, address: str) -> set[int]:
        """The numbers of the members that this agent replaces, which is none of them: they are no more.

        At their address, or, where no other is there, on their host: a pod that was made anew has another address.
        """
        there = {member.number for member in self._at_address.get(address, ()) if member.key != key}
        if there:
            return there
        here = self._on_host.get(host, [])
        if not here or any(member.key != here[0].key for member in here):
            return set()
        return {member.number for member in here if member.key != key}

    @cached_property
    def _everybody(self) -> dict[int, Member]:
        return {
            member.number: member for configuration in (self.agreed, self.proposed) for member in configuration.members
        }

    @cached_property
    def _numbers_by_key(self) -> dict[str, list[int]]:
        numbers: dict[str, list[int]] = {}
        for number, member in self._everybody.items():
            numbers.setdefault(member.key, []).append(number)
        return numbers

    @cached_property
    def _at_address(self) -> dict[str, list[Member]]:
        there: dict[str, list[Member]] = {}
        for member in self._everybody.values():
            there.setdefault(member.address, []).append(member)
        return there

    @cached_property
    def _on_host(self) -> dict[str, list[Member]]:
        there: dict[str, list[Member]] = {}
        for member in self._everybody.values():
            there.setdefault(member.host, []).append(member)
        return there

    def changed(self, change: ConfigurationChange) -> Configurations | None:
        """With a proposal that is based on a configuration known here; None if that is not so."""
        for base in (self.agreed, self.proposed):
            if base.id == change.base:
                return Configurations(base, change.apply(base))
        return None

    def settled(self, id: tuple[int, int]) -> Configurations:
        """The proposal has been agreed on."""
        return Configurations(self.proposed, self.proposed) if self.proposed.id == id else self
