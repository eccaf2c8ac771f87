"""One agent of a job on many nodes, as a value without I/O: what happens and the time go in, actions come out.

Theory of operation. An agent is, one after the other and again when it must:

    Joining ──► Follower ◄──► Candidate ◄──► Leader ◄── Founding (at the rendezvous endpoint)
       ▲            │  lost its controller │
       └────────────┴──────── removed ─────┘

A role returns what the agent becomes as a value (`becoming.py`), and knows no other role; here the role is made of it.

**Membership** is a list of agents that a majority of the last such list agrees on (`members.py`). **Leadership**: a
member that a majority votes for leads a *term*, the lowest if it is there; a voter that still hears its controller does
not vote, and nobody votes twice in a term or for somebody who knows of an older membership (`voting.py`). **Epochs** of
the job grow from term to term: one starts only when a majority knows its number. A controller that sees no majority,
and a follower that finds no controller in time, stop their workers and say so.

**State is soft.** A new controller asks everybody what runs there and goes on from that (`takeover.py`). An agent that
is started again knows nothing, and is another member; where a majority needs it, the job goes on in its next
*incarnation* (`restarted.py`), a random name that terms and epochs belong to and messages carry.
"""

from __future__ import annotations

from ..job import commands as cmd
from ..job import events as ev
from ..job.causes import describe, of_signal
from ..job.stopping import is_asked_again
from .becoming import BecomeCandidate, BecomeFollower, BecomeFounding, BecomeJoining, BecomeLeader, Next
from .candidate import Candidate
from .follower import Follower
from .founding import Founding
from .joining import Joining
from .leading.leader import Leader
from .messages import Action, Closed, Ended, Execute, NodeEvent, Received
from .roles import Context, NodeConfig, Role


class Node:
    """Not thread-safe: one shell drives it, one event after the other."""

    def __init__(self, config: NodeConfig) -> None:
        self.context = Context(config)
        self._role: Role | None = None
        self._leaving: cmd.End | None = None
        self._asked: tuple[int, float] | None = None
        self._kill_due: float | None = None
        self._ended = False

    def handle(self, event: NodeEvent, now: float) -> list[Action]:
        """What must be done because of `event`. `now` is monotonic, in seconds."""
        context = self.context
        context.now = now
        if not self._ended:
            self._take(event)
        actions, context.actions = context.actions, []
        for index, action in enumerate(actions):
            if isinstance(action, Ended):
                self._ended = True
                return actions[: index + 1]
        return actions

    def next_deadline(self) -> float | None:
        """When `handle` wants a TimePassed event; None for never."""
        if self._ended or self._role is None:
            return None
        dues = [due for due in (self._role.next_deadline(), self._kill_due) if due is not None]
        return min(dues, default=None)

    @property
    def role(self) -> Role | None:
        return self._role

    def _take(self, event: NodeEvent) -> None:
        context, role = self.context, self._role
        match event:
            case ev.Begin():
                self._become(BecomeFounding() if context.config.founder else BecomeJoining())
            case ev.StopRequested():
                self._stop(event.signum)
            case ev.WorkerEvent() | ev.HookEnded():
                context.local.happened(event)
                if role is not None:
                    self._become(role.happened(event))
                self._leave_when_gone()
            case Received() if role is not None and event.key != context.config.key:
                self._become(role.received(event.key, event.address, event.message))
            case Closed() if role is not None:
                self._become(role.closed(event.address, event.key))
            case ev.TimePassed() if role is not None:
                if self._kill_due is not None and context.now >= self._kill_due:
                    self._kill_due = None
                    context.kill_workers("they did not stop in time")
                self._become(role.tick())

    def _become(self, next_role: Next | None) -> None:
        while next_role is not None and not any(isinstance(action, Ended) for action in self.context.actions):
            self._role = role = _made(self.context, next_role)
            next_role = role.begin()

    # ---- this agent is told to go ----------------------------------------------------------------------------------

    def _stop(self, signum: int) -> None:
        """It leaves the job to the others: its workers are stopped, then it ends. Asked again: at once."""
        context = self.context
        if self._asked is not None:
            if is_asked_again(*self._asked, signum, context.now):
                context.kill_workers("asked to stop again")
            return
        self._asked = (signum, context.now)
        cause = of_signal(signum)
        if self._role is not None:
            self._role.leave(describe(cause))
            self._kill_due = context.now + context.config.shutdown_timeout
            context.actions.append(Execute(cmd.StopWorkers(signum)))
        self._leaving = cmd.End(cmd.EXIT_SIGNAL_BASE + signum, describe(cause), cause)
        self._role = _Gone(context)
        self._leave_when_gone()

    def _leave_when_gone(self) -> None:
        if self._leaving is not None and not self.context.local.workers:
            self.context.actions.append(Ended(self._leaving))


def _made(context: Context, next_role: Next) -> Role:
    """The one place that knows all roles."""
    match next_role:
        case BecomeJoining():
            return Joining(context, next_role.first)
        case BecomeFounding():
            return Founding(context)
        case BecomeFollower(key, address, term, configurations):
            return Follower(context, key, address, term, configurations)
        case BecomeCandidate(lost, reason, stranded):
            return Candidate(context, lost, reason, stranded=stranded)
        case BecomeLeader():
            return Leader(context, next_role)


class _Gone(Role):
    """It has left, and waits for its workers."""

    def received(self, key: str, address: str, message: object) -> Next | None:
        return None

    def tick(self) -> Next | None:
        return None

    def next_deadline(self) -> float | None:
        return None
