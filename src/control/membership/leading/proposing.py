"""A controller and its members: it proposes who they are, a quorum agrees, and then it takes the job over."""

from __future__ import annotations

from abc import abstractmethod

from ...job import commands as cmd
from ...job import events as ev
from ...job.job import Job
from ...job.state import NodeState
from ..becoming import BecomeLeader, Next
from ..messages import Lead, Propose, Report, Settled, Tell
from ..roles import Context
from .directing import Directing, Progress
from .liveness import Liveness
from .proposal import Proposal
from .takeover import rebuild, was_begun

_TOGETHER_S, _TOGETHER_PER_MEMBER_S = 0.002, 0.00001
"""Changes that come within so many seconds are one proposal: the connections of a rack do not close at one moment, and
a proposal goes to every member."""


class Proposing(Directing):
    """It acts for the job (`directing.py`) only after a quorum has agreed on a membership in its own term."""

    def __init__(self, context: Context, elected: BecomeLeader) -> None:
        super().__init__(context, elected.term)
        self._proposal = Proposal(elected, context.config.key, context.config.min_quorum)
        self._founding = elected.joins if elected.founds else None
        self._lost, self._reason = elected.lost, elected.reason
        self._epochs: dict[int, int] = {}
        """The highest epoch numbers that joining nodes have seen."""
        self._by_key: dict[str, Progress] = {}
        self._at: dict[str, list[Progress]] = {}
        """The followers by address."""
        self._unreported: set[int] = set()
        self._reported = self._proposal.tally()
        self._liveness = Liveness(context.config, elected.voters, context.now)
        self._propose_due: float | None = None
        """Somebody has joined or is lost, and that is not proposed yet."""
        self._early: list[tuple[int, Tell]] = []
        """What followers have told after their reports and before the job was there."""

    @abstractmethod
    def _told(self, follower: Progress, tell: Tell) -> Next | None:
        """A follower has told something."""

    # ---- followers -------------------------------------------------------------------------------------------------

    def _add(self, follower: Progress) -> None:
        member = follower.member
        self._followers[member.number] = self._by_key[member.key] = follower
        self._at.setdefault(member.address, []).append(follower)
        self._unreported.add(member.number)
        self._liveness.joins(follower)

    def _remove(self, follower: Progress) -> None:
        member = follower.member
        del self._followers[member.number]
        self._at[member.address].remove(follower)
        if not self._at[member.address]:
            del self._at[member.address]
        if self._by_key.get(member.key) is follower:
            del self._by_key[member.key]
        self._unreported.discard(member.number)
        self._reported.discard(member.key)

    def _reports(self, follower: Progress, report: Report) -> Next | None:
        """The first thing that a follower tells."""
        if follower.report is not None:
            return None
        follower.report = report
        self._unreported.discard(follower.member.number)
        self._reported.add(follower.member.key)
        self._note_enough()
        self.context.local.learn(report)
        configurations = self._proposal.configurations
        if report.configuration == configurations.agreed.id == configurations.proposed.id:
            self._order(follower, Settled(report.configuration), None)  # the others were told before
        return self._acknowledges(follower, report.configuration)

    def _note_enough(self) -> None:
        liveness = self._liveness
        if not liveness.enough and not liveness.has_job and self._reported.is_quorum:
            liveness.enough = True
            liveness.look_again(self._followers.values(), self.context.now)

    def _count_reports(self) -> None:
        """Anew, as the membership is another."""
        if not self._liveness.enough:
            keys = [follower.member.key for follower in self._followers.values() if follower.report is not None]
            self._reported = self._proposal.tally(keys)
            self._note_enough()

    # ---- a membership ----------------------------------------------------------------------------------------------

    def _propose_soon(self) -> None:
        """Until then nothing is settled: what was proposed last is not what should be."""
        if self._propose_due is None:
            members = len(self._proposal.wanted)
            self._propose_due = self.context.now + _TOGETHER_S + _TOGETHER_PER_MEMBER_S * members

    def _propose(self) -> Next | None:
        """The members that should be, unless that is what was proposed last."""
        self._propose_due = None
        if self._end is not None:
            return None
        proposal = self._proposal
        if proposal.renew():
            self.context.change_configurations(proposal.configurations)
            self._count_reports()
            memory = self._memory()
            for follower in self._followers.values():
                if follower.report is None:
                    self._send_lead(follower)
                else:
                    self._order(follower, Propose(proposal.change), memory)
        return self._settle()

    def _send_lead(self, follower: Progress) -> None:
        proposal = self._proposal
        configurations = proposal.configurations if follower.needs_configurations else None
        job = proposal.configurations.proposed.founder
        lead = Lead(self.term, proposal.change, configurations, self._memory(), job)
        self.context.send(follower.member.address, lead)

    def _acknowledges(self, follower: Progress, configuration: tuple[int, int]) -> Next | None:
        """A follower knows this membership."""
        if configuration == self._proposal.configurations.proposed.id:
            self._proposal.acknowledge(follower.member.key)
        elif follower.report is not None and follower.report.configuration == configuration:
            # It followed an earlier proposal, which it can only have been sent as a Lead.
            self._order(follower, Propose(self._proposal.change), self._memory())
        return self._settle()

    def _settle(self) -> Next | None:
        """Has a quorum of both memberships acknowledged the proposal?"""
        proposal = self._proposal
        if self._propose_due is not None:
            return None
        if proposal.is_agreed:
            return self._take_over()
        if not proposal.is_acknowledged:  # the job may be taken over with what was agreed on before, in this term
            return self._take_over() if proposal.is_known else None
        before = proposal.configurations.agreed
        proposal.agree()
        self.context.configurations = proposal.configurations
        self._count_reports()
        for follower in self._followers.values():
            if follower.report is not None:
                self._order(follower, Settled(proposal.configurations.agreed.id), None)
        if self._job is None:
            return self._take_over()
        known = {member.number for member in before.members}
        for member in proposal.configurations.agreed.members:
            if member.number not in known or member.number not in self._job.state.nodes:
                epoch = self._epochs.get(member.number, -1)
                self._pending.append(ev.NodeJoined(member.number, member.workers, epoch, member.role))
        self._pending.append(self._nodes_agreed())
        self._run(None)
        return None

    def _nodes_agreed(self) -> ev.NodesAgreed:
        return ev.NodesAgreed(self._proposal.configurations.proposed.quorum(self.context.config.min_quorum))

    # ---- the job ---------------------------------------------------------------------------------------------------

    def _take_over(self) -> Next | None:
        """Once all have reported, or those who have not are given up."""
        context, proposal = self.context, self._proposal
        if self._job is not None or proposal.configurations.agreed.term != self.term or context.number is None:
            return None
        if self._unreported:
            return None
        reports = {number: f.report for number, f in self._followers.items() if f.report is not None}
        reports[context.number] = context.local.report(proposal.configurations.proposed.id)
        members = [proposal.wanted[number] for number in sorted(proposal.wanted)]
        nodes = {member.number: NodeState(member.workers, member.role) for member in members}
        if self._founding is None and was_begun(reports):
            self._resume(nodes, reports)
        elif not self._begin_job(nodes, reports):
            return None
        self._liveness.has_job = True
        self._run(None)
        early, self._early = self._early, []
        for number, tell in early:
            follower = self._followers.get(number)
            becomes = None if follower is None else self._told(follower, tell)
            if becomes is not None:
                return becomes
        return None

    def _begin_job(self, nodes: dict[int, NodeState], reports: dict[int, Report]) -> bool:
        if len(nodes) < self.context.config.job.min_nodes:
            return False  # the founder was lost before the job began; others may come
        self._job = Job(self.context.config.job, nodes)
        epochs = [*self._epochs.values(), *(report.epoch for report in reports.values())]
        self._job.state.next_epoch = max(epochs, default=-1) + 1
        self._founding = None
        self._pending += [self._nodes_agreed(), ev.Begin()]
        return True

    def _resume(self, nodes: dict[int, NodeState], reports: dict[int, Report]) -> None:
        lost = self._lost
        what = "a node" if lost is None else f"node {lost.number} ({lost.host})"
        cause = cmd.Cause("node", None, f"{what}, which led the job, {self._reason or 'is lost'}")
        state, commands = rebuild(self.context.config.job, nodes, reports, cause, self.context.now)
        self._job = Job.resume(state)
        self._carry_out(commands)
        self._job_due = self._job.next_deadline()
        self._pending.append(self._nodes_agreed())
