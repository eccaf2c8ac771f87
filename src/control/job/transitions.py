"""The one table: what every event leads to in every phase. Theory of operation:

A job is one slot per rank (`state.Slot`) and one phase (`state.Phase`), together `state.JobState`.
`Job.handle` drops what is stale, looks the pair (phase, type of the event) up here, and the function found
changes the value and returns the commands that the shell must execute. A pair that is not here changes
nothing and is counted. There is no other way to change a job, and nothing in this package does I/O, reads a
clock or starts a thread.

    NEW -> PREPARING -> ASSEMBLING -> RUNNING -> ASSEMBLING ... -> CONCLUDING -> ENDED
               ^            |          |   ^
               |            |    fault v   | all ranks at the barrier
               |            |      RECOVERING
               |            v          v
               +------- RESTARTING (every process anew)     or  STOPPING (give up) -> ENDED

**Epochs.** An epoch is one attempt of the whole job, and its number is never used again. It starts when every
rank waits at the barrier and fails with the first fault in it. The processes of a rank are told apart by
their incarnation. Every event of a worker names its process and, where it matters, the epoch: that fences
off what is late or said twice.

**Scopes escalate.** *In process*: survivors unwind and come back to the barrier, each with a deadline; a lost
rank alone gets a new process; then the next epoch starts, with a plan of who gives state to whom.
*Process*: all are stopped and started anew, `max_restarts` times, for what cannot be mended in process:
there is no wrapped function, or one has finished already (a new process would begin with it), or
`max_inprocess_restarts` is used up. Then *the end*. Epochs that fail in a row without a completed optimizer
step end the job at once, with the first cause: its code is broken, not its machine.

**Nobody waits in vain.** Where somebody waits at a barrier, whoever is awaited has a deadline: after a
fault from the fault on, otherwise from the first arrival on. Who misses it is killed and replaced, and who
cannot be killed ends the job. A process that never comes to a wrapped function is treated as torchrun
would, and has none. Who waits in torch.distributed for a rank that has returned from the function is freed
by a recovery, and the second time by the end of the job.

**Nodes.** A rank is held by a node. One that is lost is the death of all its ranks; its place is a hole that a
spare takes once a majority has agreed that the node is gone, or that the world shrinks by when none has come in
time. An epoch starts only when a majority knows its number, so that no later controller uses it again.

The functions: `nodes.py` and `placement.py` deal with nodes, `launch.py` starts processes and concludes,
`barrier.py` begins and finishes epochs, `recovery.py` deals with faults, `returning.py` with ranks that return
before the others, `stopping.py` stops processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import barrier, launch, nodes, recovery, returning, stopping
from . import events as ev
from .commands import Command
from .state import JobState, Phase

Transition = Callable[[JobState, Any, float], list[Command]]

TRANSITIONS: dict[tuple[Phase, type[ev.Event]], Transition] = {
    (Phase.NEW, ev.Begin): launch.begin,
    (Phase.NEW, ev.StopRequested): stopping.stop_requested,
    #
    (Phase.PREPARING, ev.HookEnded): launch.pre_train_ended,
    (Phase.PREPARING, ev.StopRequested): stopping.stop_requested,
    #
    (Phase.ASSEMBLING, ev.Attached): barrier.attached,
    (Phase.ASSEMBLING, ev.Arrived): barrier.arrived,
    (Phase.ASSEMBLING, ev.Exited): recovery.exited_outside,
    (Phase.ASSEMBLING, ev.Condemned): recovery.condemned_too,
    (Phase.ASSEMBLING, ev.TimePassed): nodes.time_passed,
    (Phase.ASSEMBLING, ev.StopRequested): stopping.stop_requested,
    #
    (Phase.RUNNING, ev.Registered): barrier.registered,
    (Phase.RUNNING, ev.Stepped): recovery.stepped,
    (Phase.RUNNING, ev.Holds): recovery.holds,
    (Phase.RUNNING, ev.Completed): returning.completed,
    (Phase.RUNNING, ev.Waits): returning.waits,
    (Phase.RUNNING, ev.TimePassed): returning.tell_returned,
    (Phase.RUNNING, ev.Faulted): returning.raised,
    (Phase.RUNNING, ev.Exited): recovery.died,
    (Phase.RUNNING, ev.Condemned): recovery.condemned,
    (Phase.RUNNING, ev.Arrived): recovery.arrived_unannounced,
    (Phase.RUNNING, ev.StopRequested): stopping.stop_requested,
    #
    (Phase.RECOVERING, ev.Attached): barrier.attached,
    (Phase.RECOVERING, ev.Arrived): barrier.arrived,
    (Phase.RECOVERING, ev.Registered): barrier.registered,
    (Phase.RECOVERING, ev.Stepped): recovery.stepped,
    (Phase.RECOVERING, ev.Holds): recovery.holds,
    (Phase.RECOVERING, ev.Faulted): recovery.raised_too,
    (Phase.RECOVERING, ev.Exited): recovery.died_too,
    (Phase.RECOVERING, ev.Condemned): recovery.condemned_too,
    (Phase.RECOVERING, ev.TimePassed): nodes.time_passed,
    (Phase.RECOVERING, ev.StopRequested): stopping.stop_requested,
    #
    (Phase.RESTARTING, ev.Exited): stopping.exited,
    (Phase.RESTARTING, ev.Completed): stopping.completed,
    (Phase.RESTARTING, ev.TimePassed): stopping.overdue,
    (Phase.RESTARTING, ev.StopRequested): stopping.stop_requested,
    #
    (Phase.CONCLUDING, ev.HookEnded): launch.post_train_ended,
    (Phase.CONCLUDING, ev.StopRequested): stopping.stop_requested,
    #
    (Phase.STOPPING, ev.Exited): stopping.exited,
    (Phase.STOPPING, ev.Completed): stopping.completed,
    (Phase.STOPPING, ev.HookEnded): stopping.hook_ended,
    (Phase.STOPPING, ev.TimePassed): stopping.overdue,
    (Phase.STOPPING, ev.StopRequested): stopping.stop_requested,
    #
    (Phase.GATHERING, ev.TimePassed): nodes.overdue_while_gathering,
    (Phase.GATHERING, ev.StopRequested): stopping.stop_requested,
    #
    (Phase.NEW, ev.NodeJoined): nodes.noted,
    (Phase.NEW, ev.NodesAgreed): nodes.noted,
    (Phase.NEW, ev.NodeLost): nodes.lost_while_gathering,
    #
    (Phase.PREPARING, ev.NodeJoined): nodes.noted,
    (Phase.PREPARING, ev.NodesAgreed): nodes.noted,
    (Phase.PREPARING, ev.NodeLost): launch.hook_node_lost,
    (Phase.PREPARING, ev.Opened): nodes.opened,
    #
    (Phase.ASSEMBLING, ev.NodeJoined): nodes.joined,
    (Phase.ASSEMBLING, ev.NodesAgreed): nodes.agreed,
    (Phase.ASSEMBLING, ev.NodeLost): nodes.lost,
    (Phase.ASSEMBLING, ev.Opened): nodes.opened,
    #
    (Phase.RUNNING, ev.NodeJoined): nodes.joined,
    (Phase.RUNNING, ev.NodesAgreed): nodes.agreed,
    (Phase.RUNNING, ev.NodeLost): nodes.lost,
    (Phase.RUNNING, ev.Opened): nodes.opened,
    #
    (Phase.RECOVERING, ev.NodeJoined): nodes.joined,
    (Phase.RECOVERING, ev.NodesAgreed): nodes.agreed,
    (Phase.RECOVERING, ev.NodeLost): nodes.lost,
    (Phase.RECOVERING, ev.Opened): nodes.opened,
    #
    (Phase.RESTARTING, ev.NodeJoined): nodes.noted,
    (Phase.RESTARTING, ev.NodesAgreed): nodes.noted,
    (Phase.RESTARTING, ev.NodeLost): stopping.node_lost,
    (Phase.RESTARTING, ev.Opened): nodes.opened,
    #
    (Phase.GATHERING, ev.NodeJoined): nodes.joined,
    (Phase.GATHERING, ev.NodesAgreed): nodes.agreed,
    (Phase.GATHERING, ev.NodeLost): nodes.lost_while_gathering,
    (Phase.GATHERING, ev.Opened): nodes.opened,
    #
    (Phase.CONCLUDING, ev.NodeJoined): nodes.noted,
    (Phase.CONCLUDING, ev.NodesAgreed): nodes.noted,
    (Phase.CONCLUDING, ev.NodeLost): launch.hook_node_lost,
    #
    (Phase.STOPPING, ev.NodeJoined): nodes.noted,
    (Phase.STOPPING, ev.NodesAgreed): nodes.noted,
    (Phase.STOPPING, ev.NodeLost): stopping.node_lost,
}
