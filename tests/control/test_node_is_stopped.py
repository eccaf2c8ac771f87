"""An agent of many that is told to go: what comes by two ways is one request."""

from __future__ import annotations

import signal

from hyperpodrun.control.job import commands as cmd
from hyperpodrun.control.job import events as ev
from hyperpodrun.control.job.state import JobConfig
from hyperpodrun.control.membership.messages import Action, Ended, Execute
from hyperpodrun.control.membership.node import Node
from hyperpodrun.control.membership.roles import NodeConfig


def running_node() -> tuple[Node, float, list[cmd.Spawn]]:
    """One that leads a job of one node, whose two workers run; and the time."""
    config = NodeConfig(
        key="a", host="a", address="a:1", workers=2, run_id="job", job=JobConfig(world_size=0, max_nodes=1),
        seeds=("a:1",), founder=True, min_quorum=1, last_call_timeout=1.0,
    )  # fmt: skip
    node, now, spawned = Node(config), 0.0, list[cmd.Spawn]()
    actions = node.handle(ev.Begin(), now)
    for _ in range(100):
        spawned += [command for command in commands(actions) if isinstance(command, cmd.Spawn)]
        if len(spawned) == 2:
            return node, now, spawned
        due = node.next_deadline()
        assert due is not None
        now = max(now, due)
        actions = node.handle(ev.TimePassed(), now)
    raise AssertionError("its workers were not started")


def commands(actions: list[Action]) -> list[cmd.Command]:
    return [action.command for action in actions if isinstance(action, Execute)]


def test_a_signal_that_comes_again_at_once_is_the_same_request() -> None:
    node, now, spawned = running_node()
    assert commands(node.handle(ev.StopRequested(signal.SIGTERM), now)) == [cmd.StopWorkers(signal.SIGTERM)]
    assert commands(node.handle(ev.StopRequested(signal.SIGTERM), now + 0.2)) == []
    assert commands(node.handle(ev.StopRequested(signal.SIGINT), now + 4.9)) == []
    assert commands(node.handle(ev.StopRequested(signal.SIGTERM), now + 5.1)) == [cmd.StopWorkers(signal.SIGKILL)]
    actions: list[Action] = []
    for worker in spawned:
        actions += node.handle(ev.Exited(worker.rank, worker.incarnation, -signal.SIGKILL), now + 5.2)
    (end,) = [action.end for action in actions if isinstance(action, Ended)]
    assert end.exit_code == 143, "the first signal decides it"


def test_a_second_ctrl_c_need_not_wait_so_long() -> None:
    node, now, _ = running_node()
    node.handle(ev.StopRequested(signal.SIGINT), now)
    assert commands(node.handle(ev.StopRequested(signal.SIGINT), now + 0.9)) == []
    assert commands(node.handle(ev.StopRequested(signal.SIGINT), now + 1.1)) == [cmd.StopWorkers(signal.SIGKILL)]
