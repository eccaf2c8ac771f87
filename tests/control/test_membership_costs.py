"""What a decision about the membership costs, counted in steps of Python: with twice the members at most twice as much,
and a message that one member sends costs its receiver the same in every membership.

Counted is what `control/membership/` does in the agents of a simulated job; what the job itself decides is not.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cache
from statistics import median
from types import FrameType
from typing import Any

import pytest
from hyperpodrun.control.job import events as ev
from hyperpodrun.control.membership import messages as msg
from hyperpodrun.control.membership.node import Node
from hyperpodrun.simulation.schedule import Fault, Schedule
from hyperpodrun.simulation.world import World

SIZES = (201, 401)
"""200 and 400 beside the controller."""
ENDLESS = 10**6


class Meter:
    """Counts the steps that the agents of a world take, by role and by what they are told."""

    def __init__(self, world: World) -> None:
        nodes = len(world.agents)
        self._measured_at = {f"n{index}:17000" for index in (0, nodes // 2, nodes // 2 + 1)}
        """The controller, the one that is lost, one of the others, and whoever gets votes."""
        self.by_agent: Counter[str] = Counter()
        self.by_event: defaultdict[str, list[int]] = defaultdict(list)
        self.sent: Counter[str] = Counter()
        self._steps = 0
        self._decide: Callable[[Node, msg.NodeEvent], list[msg.Action]] = world.measured
        world.measured = self._measured  # type: ignore[method-assign]

    def _measured(self, node: Node, event: msg.NodeEvent) -> list[msg.Action]:
        if isinstance(event, msg.Received) and isinstance(event.message, msg.Vote):
            self._measured_at.add(node.context.config.address)
        if node.context.config.address not in self._measured_at:
            return self._decide(node, event)
        self._steps = 0
        role = type(node.role).__name__
        sys.settrace(self._enter)
        try:
            actions = self._decide(node, event)
        finally:
            sys.settrace(None)
        if not isinstance(event, ev.WorkerEvent):  # how many see a broken connection is left to chance
            self.by_agent[node.context.config.address] += self._steps
        self.by_event[f"{role}: {_kind(event)}"].append(self._steps)
        for action in actions:
            if isinstance(action, msg.Send):
                message = action.message
                self.sent[type(message.command if isinstance(message, msg.Order) else message).__name__] += 1
        return actions

    def _enter(self, frame: FrameType, event: str, argument: object) -> Any:
        if "/membership/" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._step

    def _step(self, frame: FrameType, event: str, argument: object) -> Any:
        self._steps += event == "opcode"
        return self._step


def _kind(event: msg.NodeEvent) -> str:
    message: object = event.message if isinstance(event, msg.Received) else event
    if isinstance(message, msg.Tell):
        message = message.event
    elif isinstance(message, msg.Order):
        message = message.command
    return type(message).__name__


def many(nodes: int) -> int:
    """Three in ten: the others are twice as many in a job of twice the size."""
    return 3 * (nodes - 1) // 10


HAPPENINGS: dict[str, Callable[[int], list[Fault]]] = {
    "one leaves": lambda nodes: [Fault(2.1, "signal", nodes // 2)],
    "one is lost and comes back": lambda nodes: [Fault(2.1, "restart-agent", nodes // 2, 0.1)],
    "many are lost at once": lambda nodes: [Fault(2.1, "kill-agent", nodes - 1 - i) for i in range(many(nodes))],
    "the leader is lost": lambda nodes: [Fault(2.1, "kill-agent", 0)],
    "many are lost and the leader with them": lambda nodes: [Fault(2.1, "kill-agent", i) for i in range(many(nodes))],
}
PROPOSES = {"one leaves": 1, "one is lost and comes back": 2, "many are lost at once": 1}
"""How often every member is told of another membership at most, where the controller stays."""
TWICE = 2.05
"""With a little for chance: jitter moves a heartbeat over the end of the time that is measured."""
FROM_MANY = 20


@cache
def lives(happening: str, nodes: int) -> Meter:
    """What the agents do from two seconds after the beginning, when all train."""
    schedule = Schedule(
        seed=1,
        nodes=nodes,
        min_nodes=nodes // 2 + 1,
        steps=ENDLESS,
        jitter=0.001,
        hole_timeout=500.0,
        faults=tuple(HAPPENINGS[happening](nodes)),
    )
    world = World(schedule, check=False)
    world.run(2.0)
    meter = Meter(world)
    world.run(3.6)
    return meter


@pytest.mark.parametrize("happening", HAPPENINGS)
def test_twice_the_members_cost_at_most_twice_as_much(happening: str) -> None:
    small, large = (lives(happening, nodes) for nodes in SIZES)
    assert 0 < max(large.by_agent.values()) <= TWICE * max(small.by_agent.values())
    for message, count in large.sent.items():
        assert count <= 2 * small.sent[message] + 20, message
    if happening in PROPOSES:
        assert large.sent["Propose"] + large.sent["Lead"] <= PROPOSES[happening] * SIZES[1]


@pytest.mark.parametrize("happening", HAPPENINGS)
def test_what_comes_from_each_member_costs_the_same_in_every_membership(happening: str) -> None:
    """All but the one answer of many that makes a quorum of them, whose consequence goes to all."""
    small, large = (lives(happening, nodes) for nodes in SIZES)
    kinds = {kind for kind, steps in small.by_event.items() if len(steps) >= FROM_MANY}
    assert "Leader: Heartbeat" in kinds
    assert ("Leader: Acknowledge" in kinds) if happening in PROPOSES else ("Candidate: Vote" in kinds)
    for kind in kinds:
        assert median(large.by_event[kind]) <= 1.1 * median(small.by_event[kind]), kind
