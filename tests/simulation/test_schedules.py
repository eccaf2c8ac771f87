"""Thousands of jobs on many nodes in virtual time: whatever goes wrong, the rules of `simulation/rules.py` hold.

`scripts/simulate FROM TO` plays more of them. A counterexample is shrunk and printed as a file of `schedules/`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hyperpodrun.simulation.rules import Violation
from hyperpodrun.simulation.schedule import Schedule, parse, random_schedule
from hyperpodrun.simulation.world import World, shrunk

SCHEDULES = sorted((Path(__file__).parent / "schedules").glob("*.txt"))


def broken(schedule: Schedule) -> str:
    try:
        World(schedule).play()
    except Violation as violation:
        return str(violation)
    return ""


@pytest.mark.parametrize("tenth", range(10))
def test_the_rules_hold_in_random_schedules(tenth: int) -> None:
    ends: Counter[int] = Counter()
    for seed in range(tenth * 60, (tenth + 1) * 60):
        schedule = random_schedule(seed)
        world = World(schedule)
        try:
            world.play()
        except Violation as violation:
            small = shrunk(schedule, lambda other: bool(broken(other)))
            raise AssertionError(
                f"{violation}; the smallest schedule that breaks a rule:\n{small.text()}"
            ) from violation
        ends.update(agent.end.exit_code for agent in world.agents if agent.end is not None)
    assert ends[0] > 50, "nearly every job should survive what happens here"


@pytest.mark.parametrize("path", SCHEDULES, ids=[path.stem for path in SCHEDULES])
def test_schedules_that_once_broke_a_rule(path: Path) -> None:
    World(parse(path.read_text())).play()


def test_a_schedule_is_the_same_as_its_text() -> None:
    for seed in range(50):
        schedule = random_schedule(seed)
        assert parse(schedule.text()) == schedule


def test_the_same_schedule_is_the_same_life() -> None:
    lives = []
    for _ in range(2):
        world = World(random_schedule(11))
        world.play()
        lives.append([(agent.address, agent.notes, agent.end) for agent in world.agents])
    assert lives[0] == lives[1]
