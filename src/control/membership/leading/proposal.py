"""The membership as a controller wants it, as it has proposed it, and as a quorum has agreed on it. Pure.

A change costs O(members) when it is proposed and when it is agreed on; a lost member and an answer cost O(1).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..becoming import BecomeLeader
from ..members import Configuration, ConfigurationChange, Configurations, Member
from ..tally import Tally


class Proposal:
    """Of one term."""

    def __init__(self, elected: BecomeLeader, own_key: str, min_nodes: int | None) -> None:
        self._term = elected.term
        self._own_key, self._min_nodes = own_key, min_nodes
        self.configurations = elected.configurations
        self.wanted = _wanted(elected)
        """By number: who should be a member."""
        self._next_number = elected.configurations.proposed.next_number
        self._elected = None if elected.founds else elected.configurations
        """Until something is agreed on in this term, its voters count as they did at the election, too."""
        self._serial = 0
        self._change: ConfigurationChange | None = None
        self._acknowledged = self.tally()
        self._present = self._count_present()

    # ---- what should be --------------------------------------------------------------------------------------------

    def new_number(self) -> int:
        """Never given to another member."""
        self._next_number += 1
        return self._next_number - 1

    def add(self, member: Member) -> None:
        self.wanted[member.number] = member
        self._present.add(member.key)

    def remove(self, member: Member, *, is_back: bool) -> bool:
        """A member is lost: whether its controller still leads a majority.

        Of what was agreed on, that is: what was proposed since need not agree to the next proposal, as nobody but this
        controller can settle it. `is_back`: its agent is there, and asks to be another member.
        """
        self.wanted.pop(member.number, None)
        self._acknowledged.discard(member.key)
        if not is_back:
            self._present.discard(member.key)
        is_led = self._present.is_quorum
        self._present.discard(member.key)
        return is_led

    # ---- what is proposed ------------------------------------------------------------------------------------------

    @property
    def change(self) -> ConfigurationChange:
        """From what was agreed on to what is proposed."""
        if self._change is None:
            self._change = ConfigurationChange.between(self.configurations.agreed, self.configurations.proposed)
        return self._change

    def renew(self) -> bool:
        """Proposes what is wanted. False if that is what was proposed last."""
        members = tuple(self.wanted[number] for number in sorted(self.wanted))
        if self._serial and members == self.configurations.proposed.members:
            return False
        self._serial += 1
        base = self.configurations.agreed
        proposed = Configuration(self._term, self._serial, members, self._next_number, base.founder, base.succeeds)
        self.configurations, self._change = Configurations(base, proposed), None
        self._acknowledged = self.tally()
        return True

    def acknowledge(self, key: str) -> None:
        """This member knows what is proposed."""
        self._acknowledged.add(key)

    @property
    def is_acknowledged(self) -> bool:
        """By a quorum of each membership that must agree."""
        return self._acknowledged.is_quorum

    @property
    def is_known(self) -> bool:
        """To a quorum of the members that it names."""
        return self._acknowledged.is_quorum_of(self.configurations.proposed)

    @property
    def is_agreed(self) -> bool:
        return self.configurations.agreed.id == self.configurations.proposed.id

    def agree(self) -> None:
        """What is proposed is the membership now."""
        proposed = self.configurations.proposed
        self.configurations, self._change, self._elected = Configurations(proposed, proposed), None, None
        self._present = self._count_present()

    # ---- who may act -----------------------------------------------------------------------------------------------

    def tally(self, keys: Iterable[str] = ()) -> Tally:
        """Counts whether these agents and this one may act for what is agreed on and what is proposed."""
        return Tally([self.configurations.proposed, *self._must_agree()], self._min_nodes, [self._own_key, *keys])

    def _count_present(self) -> Tally:
        keys = [member.key for member in self.wanted.values()]
        return Tally(self._must_agree(), self._min_nodes, [self._own_key, *keys])

    def _must_agree(self) -> Iterator[Configuration]:
        yield self.configurations.agreed
        if self._elected is not None:
            yield from (self._elected.agreed, self._elected.proposed)


def _wanted(elected: BecomeLeader) -> dict[int, Member]:
    """All but the controller that is lost, and those who were given up before that was agreed on, and are there."""
    agreed, proposed = elected.configurations.agreed, elected.configurations.proposed
    wanted = {member.number: member for member in proposed.members if member != elected.lost}
    keys = {member.key for member in wanted.values()}
    back = (member for member in agreed.members if member.key in elected.voters and member.key not in keys)
    return wanted | {member.number: member for member in back}
