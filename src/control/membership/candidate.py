"""A member whose controller is lost: it finds another, or becomes it, or finds that there is no majority."""

from __future__ import annotations

from collections import Counter

from ..job import commands as cmd
from .becoming import BecomeJoining, BecomeLeader, Next
from .following import follow
from .messages import Ended, Hold, Join, Lead, PeerMessage, Redirect, RequestVote, Vote
from .restarted import Restarted
from .roles import Context, Role
from .tally import Tally
from .voting import answer_as_member

_STAND_AGAIN_S = 0.1
_STAND_AFTER_LOWER_S = 0.05
_LATER_AT_MOST_S = 1.0
_SPREAD_S = 2.0
"""Members that are equally patient, since many lower ones are silent, stand at random moments of so many seconds."""
_ANSWER_S = 1.0
"""From a request to its last vote, where everybody is quick. Whoever is slow is asked again for the same term."""
_REQUESTS_PER_S = 500
"""Of one candidate: in a large membership it asks less often."""


class Candidate(Role):
    """The controller is lost: the lowest member that a quorum votes for is the next.

    Who finds no majority for as long as the others may take to do without it stops its workers, and goes on trying.

    Where members were started again, they and those who remember can be a majority together: `restarted.py`.
    """

    def __init__(self, context: Context, lost: str, reason: str, *, stranded: bool = False) -> None:
        super().__init__(context)
        self._lost = lost
        self._reason = reason
        self._stranded = stranded
        limit = context.config.heartbeat_limit
        self._strand_due = context.now + limit
        self._deadline = context.now + context.config.join_timeout
        self._seek: tuple[float, str] | None = None
        self._request: RequestVote | None = None
        self._votes: dict[str, float] = {}
        """Who has voted for it, by key, and when; also those in no job. Slow ones answer an earlier question."""
        self._opposed = False
        self._tally = Tally((), None)
        self._replacing: dict[str, int] = {}
        """Of those who have voted: how many members they replace."""
        self._restarted = Restarted(context)
        self._old = context.configurations.find(lost)
        """The controller that is lost."""
        self._lower = self._lower_members()
        self._lower_left = self._lower.total()
        self._asked = context.now
        self._stand_at = context.now + self._patience()

    def begin(self) -> Next | None:
        lost = self._lost if self._old is None else self._old.host
        if not self._stranded and self._lost != self.context.config.key:
            self.context.note("controller-lost", node=lost, reason=self._reason)
        return self.tick()

    def received(self, key: str, address: str, message: PeerMessage) -> Next | None:
        context = self.context
        match message:
            case Lead():
                return follow(context, key, address, message)
            case RequestVote():
                self._answer(key, address, message)
            case Vote() if self._request is not None and message.term == self._request.term:
                return self._count(key, message)
            case Redirect() if self._seek is None:
                self._seek = (context.now + _ANSWER_S, message.address)
            case Join():
                if self._stranded:
                    context.send(address, Hold())
                return self._meet(message)
        return None

    def closed(self, address: str, key: str) -> Next | None:
        """One less to wait for: perhaps it is this node's turn."""
        self._lower_left -= self._lower.pop(address, 0)
        self._restarted.closed(address, key)
        if self._request is None:
            self._stand_at = min(self._stand_at, self._asked + self._patience())
        return None

    def tick(self) -> Next | None:
        context = self.context
        if context.now >= self._deadline:
            limit = f"{context.config.join_timeout:g} s"
            reason = f"no majority of the {len(context.configurations.agreed.members)} nodes was there for {limit}"
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

    # ---- an election -----------------------------------------------------------------------------------------------

    def _lower_members(self) -> Counter[str]:
        """Who stands before this one, by address."""
        context = self.context
        return Counter(
            member.address
            for member in context.configurations.proposed.members
            if context.number is not None and member.number < context.number and member.key != self._lost
        )

    def _patience(self) -> float:
        """Lower members stand first; where many of them are silent, and always after a term without result, chance
        decides."""
        patience = _STAND_AFTER_LOWER_S * self._lower_left
        if patience < _LATER_AT_MOST_S and not self._opposed:
            return patience
        return min(patience, _LATER_AT_MOST_S) + self.context.dice.uniform(0.0, _SPREAD_S)

    def _stand(self) -> Next | None:
        """Ask whether there would be votes; a candidate that nobody wants changes nobody's term."""
        context, request = self.context, self._request
        own_term = request is not None and request.term == context.term and context.voted == context.config.key
        if request is None or request.pre or self._opposed or not own_term:
            asked = RequestVote(context.term + 1, context.configurations.proposed.id, pre=True, job=context.job)
            recent = context.now - context.config.heartbeat_limit / 2
            same = asked == request
            self._votes = {key: at for key, at in self._votes.items() if same and at >= recent}
            self._request = asked
        self._opposed = False
        return self._ask()

    def _ask(self) -> Next | None:
        context = self.context
        assert self._request is not None
        self._asked = context.now
        asked = (context.configurations.agreed, context.configurations.proposed)
        self._tally = Tally(asked, context.config.min_quorum)
        self._replacing.clear()
        for key in [*self._votes, context.config.key]:
            self._add_vote(key, self._votes.get(key, context.now))
        self._votes[context.config.key] = context.now
        addresses = [member.address for member in context.configurations.everybody().values()]
        addresses += self._restarted.addresses
        wait = max(_STAND_AGAIN_S, len(addresses) / _REQUESTS_PER_S)
        again = _ANSWER_S if self._stranded or not self._request.pre else wait
        self._stand_at = context.now + again + self._patience()
        for address in dict.fromkeys(addresses):
            if address != context.config.address:
                context.send(address, self._request)
        return self._decide()

    def _count(self, key: str, vote: Vote) -> Next | None:
        context = self.context
        assert self._request is not None
        if vote.pre != self._request.pre:
            return None
        if vote.join is not None and vote.join.key == key:
            self._restarted.note(vote.join)
        if not vote.granted:
            self._opposed |= not vote.pre
            if vote.leader and vote.leader != context.config.address:
                is_old = self._old is not None and vote.leader == self._old.address
                wait = self._strand_due - context.now if is_old else _ANSWER_S
                if self._seek is None:
                    self._seek = (context.now + max(_ANSWER_S, wait), vote.leader)
            return None
        self._add_vote(key, context.now)
        return self._decide()

    def _add_vote(self, key: str, at: float) -> None:
        self._votes[key] = at
        self._tally.add(key)
        replaces = len(self._restarted.replaces(key))
        if replaces:
            self._replacing[key] = replaces

    def _decide(self) -> Next | None:
        context, request = self.context, self._request
        assert request is not None
        replaced = {} if self._tally.is_quorum else self._replaced()
        if not self._tally.is_quorum and not replaced:
            return None
        if request.pre:
            context.pledge(request.term, context.config.key)
            self._request = RequestVote(request.term, request.configuration, pre=False, job=context.job)
            self._votes = {}
            return self._ask()
        voters = context.configurations.numbers_of(self._votes)
        lost = None if self._old is None or self._old.number in voters else self._old
        if self._tally.is_quorum:
            configurations, joins = context.configurations, None
        else:
            configurations = self._restarted.next_incarnation(replaced, request.term)
            joins = self._restarted.joins(replaced)
            lost = lost if lost in configurations.proposed.members else None
            hosts = {member.host for member in configurations.everybody().values() if member.key in replaced}
            reason = "started again; the job goes on in its next incarnation"
            context.note("began-again", nodes=",".join(sorted(hosts)), reason=reason)
        return BecomeLeader(
            request.term, configurations, joins=joins, lost=lost, reason=self._reason, voters=frozenset(self._votes)
        )

    def _replaced(self) -> dict[str, set[int]]:
        """Which members the agents replace that were started again, if these make up for what is missing of a quorum.

        Not while a majority of those who remember may come.
        """
        if sum(self._replacing.values()) < self._tally.missing:
            return {}
        context, restarted = self.context, self._restarted
        voters = context.configurations.numbers_of(self._votes)
        replaced = restarted.replaced(self._replacing, voters)
        if not self._stranded and not restarted.no_others_can_come(replaced):
            return {}
        there = voters.union(*replaced.values())
        return replaced if context.configurations.has_quorum(there, context.config.min_quorum) else {}

    def _answer(self, key: str, address: str, request: RequestVote) -> None:
        context = self.context
        granted = answer_as_member(context, key, request)
        if granted and not request.pre:
            self._request = None
            self._stand_at = max(self._stand_at, context.now + _ANSWER_S + self._patience())
        elif granted and self._request is not None and self._request.pre and self._is_before(key):
            self._request = None  # one candidate is enough
            self._stand_at = max(self._stand_at, context.now + _ANSWER_S)
        context.send(address, Vote(request.term, request.pre, granted))

    def _is_before(self, key: str) -> bool:
        numbers = self.context.configurations.numbers_of({key})
        return self.context.number is None or max(numbers, default=self.context.number) < self.context.number

    def _meet(self, join: Join) -> Next | None:
        """An agent asks to be let in. Its vote is asked for at the next occasion, which is now if nobody is asked."""
        if not self._restarted.note(join):
            return None
        if join.key in self._votes:
            self._add_vote(join.key, self._votes[join.key])
        if self._request is None:
            self._stand_at = min(self._stand_at, max(self.context.now, self._asked + self._patience()))
        return None

    # ---- no majority -----------------------------------------------------------------------------------------------

    def _strand(self) -> None:
        context = self.context
        self._stranded = True
        agreed = context.configurations.agreed
        needed = agreed.quorum(context.config.min_quorum)
        found = f"{max(1, len(self._votes))} of {len(agreed.members)} nodes, {needed} are needed"
        hint = " (--min-nodes 1 would let one go on alone)" if len(agreed.members) == 2 else ""
        reason = f"no majority: {found}{hint}"
        context.note("minority", found=found, lost=self._reason)
        context.kill_workers(reason)

    def _give_up(self, leader: str) -> Next:
        """The others have a controller, and this node is not one of them any more."""
        reason = "the job goes on without this node"
        self.context.note("removed", leader=leader, reason=reason)
        self.context.kill_workers(reason)
        return BecomeJoining((leader,))
