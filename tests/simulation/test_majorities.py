"""A majority that is alive and connected has a leader soon, whoever was lost, is slow, or was started again."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
from hyperpodrun.control.membership import messages as msg
from hyperpodrun.control.membership.leading.leader import Leader
from hyperpodrun.simulation.agents import SimulatedAgent
from hyperpodrun.simulation.schedule import Fault, Schedule, parse
from hyperpodrun.simulation.world import World

ENDLESS = 10**6


def leaders(world: World) -> list[SimulatedAgent]:
    """Who leads a job, and is not one that the others have left."""
    return [a for a in world.live() if isinstance(a.node.role, Leader) and a.node.role.has_job]


def started(world: World) -> list[tuple[str, int]]:
    """The incarnation of the job, without the agent's key, and the epoch, of every epoch that a rank has run in."""
    return sorted(world.rules.worlds)


@pytest.mark.parametrize("first", range(1, 30, 10))
def test_sixty_members_have_a_leader_within_ten_seconds_whoever_of_the_lower_half_is_cut_off(first: int) -> None:
    for cut in range(first, min(first + 10, 30)):
        world = World(Schedule(seed=cut, nodes=60, min_nodes=31, steps=ENDLESS, jitter=0.001), check=False)
        world.run(3.0)
        everybody = sorted(world.live(), key=lambda agent: agent.node.context.number or 0)
        left = everybody[cut:]
        world.cut_off({agent.address for agent in everybody[:cut]})
        found = partial(lambda world, left: any(agent in left for agent in leaders(world)), world, left)
        world.run(13.0, found)
        assert found(), f"no leader without the lowest {cut}"


@pytest.mark.parametrize("slow_at", [2.6, 2.9, 3.2, 3.5])
@pytest.mark.parametrize(("nodes", "spares"), [(3, 1), (4, 2)])
def test_an_agent_that_gets_little_processor_time_is_waited_for(nodes: int, spares: int, slow_at: float) -> None:
    """Its vote is needed, and comes later than the next question."""
    total = nodes + spares
    killed = (total - 1) // 2
    faults = (Fault(slow_at, "slow", total - 1, 100.0), *(Fault(3.7, "kill-agent", index) for index in range(killed)))
    schedule = Schedule(seed=1, nodes=nodes, spares=spares, min_nodes=2, steps=ENDLESS, jitter=0.001, faults=faults)
    world = World(schedule)
    world.run(3.8)
    world.run(13.7, lambda: bool(leaders(world)))
    assert leaders(world)
    world.run(33.7)
    assert len(leaders(world)) == 1
    assert len({agent.leader for agent in world.live()}) == 1, "everybody follows it"


def test_who_remembers_goes_on_with_the_agents_that_were_started_again() -> None:
    """One restart of a pair costs the processes of the node that is lost, and no more: the state is still there."""
    world = World(parse("seed=1 nodes=2 workers=2 steps=40\nat 3 restart-agent 0 for 1\n"))
    world.run(3.0)
    kept = set(world.agents[1].workers)
    world.run(6.0, lambda: len(started(world)) == 2)
    assert kept
    assert set(world.agents[1].workers) == kept
    (before, first), (after, second) = sorted(started(world), key=lambda attempt: attempt[1])
    assert before != after, "what was said in the incarnation before cannot be taken for something of this one"
    assert second > first


@pytest.mark.parametrize("spares", [0, 1])
def test_two_of_three_that_were_started_again_and_the_third_that_still_trains_never_share_an_epoch(spares: int) -> None:
    """It is cut off or stands still, and with a spare the two need nobody else to begin.

    The rules of every schedule say that an epoch has one controller; here, that it is one incarnation's.
    """
    for third in ("cut 2 for 9", "freeze 2 for 9", "deaf 2 for 9"):
        text = f"seed=1 nodes={3 - spares} spares={spares} steps=60 hole_timeout=45\n"
        world = World(parse(text + f"at 2.95 {third}\nat 3 restart-many 1 for 0.3\n"))
        world.play()
        assert [agent.end.exit_code for agent in world.live() if agent.end] == [0, 0, 0], third
        (job,) = {agent.founder for agent in world.live()}
        assert job not in {agent.founder for agent in world.agents if not agent.alive}, "what was begun there is over"
        epochs = [epoch for founder, epoch in started(world) if founder == job]
        joined = max(epoch for founder, epoch in started(world) if founder != job)
        assert spares or min(epochs) > joined, "whoever remembers says how far the numbers are used up"


def test_a_restarted_agent_votes_once_in_a_term() -> None:
    """Also where it is asked as the one that has taken a member's place."""
    world = World(parse("seed=1 nodes=4 steps=40\nat 3 restart-many 1 for 0.2\n"))
    votes: dict[tuple[str, str, int], set[str]] = {}
    send = world.send

    def watch(sender: SimulatedAgent, address: str, message: msg.PeerMessage) -> None:
        if isinstance(message, msg.Vote) and not message.pre and message.granted:
            receiver = world.by_address[address]
            votes.setdefault((sender.key, receiver.founder, message.term), set()).add(receiver.key)
        send(sender, address, message)

    world.send = watch  # type: ignore[method-assign]
    world.play()
    assert any(key.startswith(("0-", "1-")) for key, _, _ in votes)
    assert all(len(candidates) == 1 for candidates in votes.values())


def test_members_that_fall_silent_together_are_one_change_of_the_membership() -> None:
    faults = tuple(Fault(3.0, "cut", 39 - index, 500.0) for index in range(15))
    world = World(Schedule(seed=1, nodes=40, min_nodes=21, steps=ENDLESS, jitter=0.001, faults=faults), check=False)
    sent: Counter[str] = Counter()
    send = world.send

    def watch(sender: SimulatedAgent, address: str, message: msg.PeerMessage) -> None:
        if isinstance(message, msg.Order):
            sent[type(message.command).__name__] += world.now > 3.0
        send(sender, address, message)

    world.send = watch  # type: ignore[method-assign]
    world.run(10.0)
    (leader,) = leaders(world)
    assert len(leader.node.context.configurations.agreed.members) == 25
    assert sent["Propose"] <= 3 * 25
