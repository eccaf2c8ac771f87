"""Single lives in virtual time whose course matters, not only their end: who founds a job, when silence is noticed."""

from __future__ import annotations

import pytest
from hyperpodrun.control.membership.leading.leader import Leader
from hyperpodrun.simulation.schedule import Schedule, parse
from hyperpodrun.simulation.world import World

CALM = "seed=1 nodes=3 spares=1 workers=1 steps=24 jitter=0.0005\n"


def notes(world: World, event: str) -> list[tuple[float, int, dict[str, object]]]:
    """(when, agent, fields) of every line of this name, by time."""
    found = [(at, agent.index, fields) for agent in world.agents for at, name, fields in agent.notes if name == event]
    return sorted(found, key=lambda note: note[:2])


def played(faults: str) -> World:
    world = World(parse(CALM + faults))
    world.play()
    return world


def test_the_second_endpoint_founds_the_job_when_the_first_is_not_there() -> None:
    world = played("at 0 kill-agent 0\n")
    at, agent, _ = notes(world, "leads")[-1]
    assert (agent, 5.0 <= at < 6.0) == (1, True)
    assert [agent.end.exit_code for agent in world.agents[1:] if agent.end] == [0, 0, 0]


def test_the_first_endpoint_comes_late_and_is_let_in() -> None:
    """Meanwhile the second has founded the job, or still waits for nodes and leaves the founding to the first."""
    for back_after in (3.0, 5.2, 8.0):
        world = played(f"at 0 kill-agent 0 for {back_after}\nat 0 kill-agent 2 for 5.5\n")
        assert len({agent.founder for agent in world.live()}) == 1, back_after
        assert [agent.end.exit_code for agent in world.live() if agent.end] == [0, 0, 0, 0], back_after


def test_the_first_endpoint_dies_after_it_has_answered() -> None:
    world = played("at 0 cut 2 for 7\nat 0.4 kill-agent 0\n")
    assert notes(world, "leads")[-1][1] == 1
    assert [agent.end.exit_code for agent in world.live() if agent.end] == [0, 0, 0]


@pytest.mark.parametrize("node", [0, 2], ids=["the leader", "a follower"])
def test_silence_is_noticed_when_the_limit_is_over(node: int) -> None:
    """Not a heartbeat later. Who is cut off has spoken within the last second before."""
    schedule = Schedule(seed=1, nodes=3, spares=1, steps=1000, jitter=0.0005)
    for cut_at in (3.1, 3.5, 3.9):
        world = World(parse(schedule.text() + f"at {cut_at} cut {node} for 30\n"))
        world.run(cut_at + 10)
        event = "controller-lost" if node == 0 else "node-lost"
        first = min(at for at, agent, _ in notes(world, event) if agent != node)
        assert cut_at + 4.0 <= first <= cut_at + 5.01
        leaders = [agent for agent in world.live() if isinstance(agent.node.role, Leader)]
        numbers = [agent.node.context.number for agent in world.agents if agent.index != node]
        assert [leader.node.context.number for leader in leaders] == [min(n for n in numbers if n is not None)]
