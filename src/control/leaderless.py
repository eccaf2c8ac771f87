"""A member whose controller is lost: it finds another, or becomes it, or finds that there is no majority."""

from __future__ import annotations

from . import commands as cmd
from .messages import Claim, Ended, Hold, Join, Lead, PeerMessage, Redirect, Vote
from .roles import Context, Role
from .seeking import Seeking

_STAND_AGAIN_S = 0.1
_STAND_AFTER_LOWER_S = 0.05
_LATER_AT_MOST_S = 1.0
_ANSWER_S = 1.0
"""From a claim to its last vote."""


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
                from .following import follow

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
