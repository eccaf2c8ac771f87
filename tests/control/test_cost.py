"""What an event costs the controller grows with what it brings about, and not with the size of the world.

Every kind of event is told to 200 and to 400 nodes with eight ranks each. Where what is sent doubles, the cost may
double; everywhere else it stays as it is.
"""

from __future__ import annotations

import random
from typing import get_args

import pytest
from filed import check_files
from hyperpodrun.control.job import commands as cmd
from hyperpodrun.control.job import events as ev
from hyperpodrun.control.job.addressing import deliver
from hyperpodrun.control.job.job import Job
from hyperpodrun.control.job.places import NodeState
from hyperpodrun.control.job.plan import Report, make_plan
from hyperpodrun.control.job.slots import Slot, SlotState
from hyperpodrun.control.job.state import JobConfig, JobState, Phase
from hyperpodrun.control.membership import messages as msg
from hyperpodrun.protocol import messages
from hyperpodrun.protocol.plan import Holding, RestorePlan, Transfer
from many_nodes import WORKERS, Cost, ManyNodes

FIRST_OF_MANY = {"first arrival"}
"""Sends nothing, and gives every other rank its deadline: once for each barrier that no fault has caused."""


def faults_and_returns(nodes: int) -> ManyNodes:
    many = ManyNodes(nodes)
    tell, of = many.tell, many.of
    many.tell(ev.NodesAgreed(nodes // 2 + 1), "agreement before the beginning")
    tell(ev.Begin(), "begin")
    last = many.ranks[-1]
    tell(ev.Attached(*of(5), 30.0), "attached")
    many.arrive(0, label="first arrival")
    many.arrive(1, label="arrival")
    many.arrive(*range(2, last))
    many.arrive(last, label="last arrival, before a majority knows the number")
    many.confirm(*range(1, nodes // 2 - 1))
    many.confirm(nodes // 2 - 1, label="confirmation")
    many.confirm(nodes // 2, label="confirmation that starts the epoch")
    tell(ev.Registered(*of(0), 0, "a"))
    tell(ev.Registered(*of(7), 0, "a"), "registered")
    tell(ev.Stepped(*of(7), 0, 11), "stepped")
    tell(ev.Holds(*of(7), 0, 11, {"": "0" * 16}), "holds")
    tell(ev.Faulted(*of(3), 0, "ValueError: boom", "frame\n" * 4000), "fault")
    tell(ev.Faulted(*of(4), 0, "ValueError: boom", "frame\n" * 4000), "fault of another")
    many.arrive(0, label="survivor")
    tell(ev.Exited(*of(9), -6), "death on the way")
    tell(ev.Condemned(*of(10), "its GPU is in error"), "condemned")
    tell(ev.Exited(*of(10), -9), "end of a killed process")
    many.now = 30.0
    tell(ev.TimePassed(), "deadline")
    tell(ev.Exited(*of(5), -9))
    many.confirm(*range(1, nodes))
    many.arrive(*(rank for rank in many.ranks[1:-1] if rank % 2 == 0), holding=Holding("", 11))
    many.arrive(*(rank for rank in many.ranks[1:-1] if rank % 2 == 1))
    many.arrive(last, label="arrival that ends a recovery")
    epoch = many.job.epoch
    tell(ev.Completed(*of(0), epoch), "first return")
    tell(ev.Completed(*of(1), epoch), "return")
    many.now += 1.0
    tell(ev.TimePassed(), "the others are told")
    tell(ev.Waits(*of(2), epoch, 2), "wait")
    for rank in many.ranks[3:-1]:
        tell(ev.Waits(*of(rank), epoch, 2))
    tell(ev.Waits(*of(last), epoch, 2), "wait of the last")
    assert many.job.phase is Phase.RECOVERING
    many.confirm(*range(1, nodes))
    many.run_an_epoch()
    epoch = many.job.epoch
    for rank in many.ranks[:-1]:
        tell(ev.Completed(*of(rank), epoch), "return before the last" if rank == last - 1 else "")
    tell(ev.Completed(*of(last), epoch), "last return")
    tell(ev.Exited(*of(0), 0), "exit")
    for rank in many.ranks[1:-1]:
        tell(ev.Exited(*of(rank), 0))
    tell(ev.Exited(*of(last), 0), "last exit")
    assert many.job.phase is Phase.ENDED
    return many


def nodes_come_and_go(nodes: int) -> ManyNodes:
    many = ManyNodes(nodes, {"max_nodes": nodes - 1})
    tell = many.tell
    tell(ev.NodesAgreed(1))
    many.run_an_epoch()
    tell(ev.NodeLost(5, "is gone"), "node lost")
    tell(ev.NodesAgreed(1), "a spare takes its place")
    tell(ev.NodeLost(6, "is gone"), "another node lost on the way")
    tell(ev.NodesAgreed(1), "agreement without a spare")
    many.run_barrier()
    many.now += 600.0
    tell(ev.TimePassed(), "the world shrinks")
    assert many.job.phase is Phase.RUNNING
    many.core.joins(nodes)
    tell(ev.NodeJoined(nodes, WORKERS), "node joins, and the world grows")
    tell(ev.NodesAgreed(1), "agreement on the way")
    assert len(many.job.state.slots) == (nodes - 1) * WORKERS
    return many


def stopping(nodes: int) -> ManyNodes:
    many = ManyNodes(nodes, {"pre_train": True, "in_process": False, "max_restarts": 1})
    tell, of = many.tell, many.of
    tell(ev.Begin(), "begin with a script")
    tell(ev.HookEnded(0, 0), "script ends")
    for node in range(1, nodes - 1):
        tell(ev.HookEnded(0, node))
    tell(ev.HookEnded(0, nodes - 1), "last script ends")
    tell(ev.Exited(*of(0), 1), "death without a function")
    for rank in many.ranks[1:-1]:
        tell(ev.Exited(*of(rank), -15), "death while all are stopped" if rank == 1 else "")
    tell(ev.Exited(*of(many.ranks[-1]), -15), "last death, and all begin again")
    for node in range(nodes):
        tell(ev.HookEnded(0, node))
    tell(ev.StopRequested(15), "signal")
    tell(ev.NodeLost(nodes - 1, "is gone"), "node lost while all are stopped")
    many.now += 30.0
    tell(ev.TimePassed(), "all are killed")
    tell(ev.Exited(*of(0), -9), "death of a killed one")
    many.now += 30.0
    tell(ev.TimePassed(), "some cannot be killed")
    assert many.job.phase is Phase.ENDED
    return many


STORIES = (faults_and_returns, nodes_come_and_go, stopping)


@pytest.fixture(scope="module")
def costs() -> dict[str, tuple[Cost, Cost]]:
    """Of 200 and of 400 nodes, by what happens."""
    found: dict[str, tuple[Cost, Cost]] = {}
    for story in STORIES:
        small, large = story(200).costs, story(400).costs
        found |= {label: (small[label], large[label]) for label in small}
    return found


def test_the_cost_of_an_event_grows_as_what_it_sends(costs: dict[str, tuple[Cost, Cost]]) -> None:
    too_much = []
    for label, (small, large) in costs.items():
        if large.messages > 1.5 * small.messages:
            limit = max(2.0, large.messages / small.messages)  # also where two nodes of 200 and of 400 are lost
        else:
            limit = 2.0 if label in FIRST_OF_MANY else 1.05
        if large.instructions > limit * small.instructions + 20:
            too_much.append(f"{label}: {small.instructions} -> {large.instructions}, {large.messages} messages")
    assert not too_much, "\n".join(too_much)


def test_every_kind_of_event_was_counted(costs: dict[str, tuple[Cost, Cost]]) -> None:
    assert {type(small.event) for small, _ in costs.values()} == set(get_args(ev.Event))


def test_what_one_node_is_told_does_not_grow_with_the_world(costs: dict[str, tuple[Cost, Cost]]) -> None:
    for label, (small, large) in costs.items():
        assert large.largest <= small.largest + 40, label
        assert large.largest < 8000, label


def test_ten_thousand_nodes_are_told_of_their_own_part_of_a_plan() -> None:
    """Also where one rank gives to all others, which is the most that a rank can have to do."""
    job = Job(JobConfig(world_size=0, max_nodes=10_000), {node: NodeState(WORKERS) for node in range(10_000)})
    reports = {rank: Report(Holding("", 7 if rank == 12 else None), managed=True) for rank in range(80_000)}
    plan = make_plan(reports)
    assert isinstance(plan, RestorePlan)
    told = dict(deliver(job.state, cmd.StartEpoch(3, plan), ()))
    assert len(told) == 10_000
    for node in (0, 1, 9_999):
        command = told[node]
        assert isinstance(command, cmd.StartEpoch)
        assert command.plan is not None
        assert len(msg.encode(msg.Order(1, node, 1, 1, command))) < msg.MAX_PEER_MESSAGE_BYTES
        for slot in command.slots:
            own = plan.part_of(slot.rank)
            assert command.plan.part_of(slot.rank) == own
            assert len(own.transfers) == (79_999 if slot.rank == 12 else 1)
            sent = messages.starting(3, {}, own)
            assert all(len(messages.encode(message)) < messages.MAX_MESSAGE_BYTES for message in sent)
            *parts, start = sent
            assert messages.joined(parts, start).plan == own


def test_a_rank_in_no_transfer_knows_that_others_receive() -> None:
    """With NCCL all ranks must make a communicator before any of them sends."""
    plan = RestorePlan(7, 0, (Transfer(0, 1),), rollbacks=(2,))
    assert [plan.part_of(rank).moves for rank in range(4)] == [True] * 4
    assert plan.part_of(2).rollbacks == (2,)
    assert not plan.part_of(3).transfers
    assert not RestorePlan(7, 0).part_of(3).moves


def test_what_is_filed_is_what_a_search_would_find() -> None:
    """Anything happens to a job of five nodes and a spare."""
    for seed in range(40):
        try:
            live(random.Random(seed))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error


def live(dice: random.Random) -> None:
    config = JobConfig(
        world_size=0, in_process=dice.random() < 0.8, max_restarts=20, min_nodes=2, max_nodes=5, stall_limit=50,
        pre_train=dice.random() < 0.2,
    )  # fmt: skip
    nodes = {node: NodeState(dice.choice((1, 2, 2)), dice.choice(("a", "a", "b"))) for node in range(6)}
    job, now, number = Job(config, nodes), 0.0, 6
    job.handle(ev.NodesAgreed(2), now)
    job.handle(ev.Begin(), now)
    for _ in range(150):
        state = job.state
        now += dice.random()
        slot = dice.choice(list(state.slots)) if len(state.slots) else None
        event: ev.Event = ev.TimePassed()
        match dice.randrange(24):
            case 0 if len(state.nodes) > 2:
                event = ev.NodeLost(dice.choice(list(state.nodes)), "is gone")
            case 1:
                event, number = ev.NodeJoined(number, 2, role=dice.choice("ab")), number + 1
            case 2 | 3:
                event = ev.NodesAgreed(2)
            case 4 | 5 | 6 if len(state.nodes):
                event = ev.Opened(dice.choice(list(state.nodes)), state.next_epoch)
            case 7:
                now = max(now, job.next_deadline() or now)
            case 8 if state.hooks:
                event = ev.HookEnded(0, dice.choice(sorted(state.hooks)))
            case kind if slot is not None:
                event = of_a_worker(dice, kind, state, slot)
        job.handle(event, now)
        job.next_deadline()
        check_files(job.state)


def of_a_worker(dice: random.Random, kind: int, state: JobState, slot: Slot) -> ev.Event:
    of, epoch = (slot.rank, slot.incarnation), slot.epoch
    match kind:
        case 9:
            return ev.Exited(*of, dice.choice((0, 1, -9)))
        case 10:
            return ev.Faulted(*of, epoch, "boom", consequence=dice.random() < 0.5)
        case 11:
            return ev.Completed(*of, epoch, dice.choice(("", "break")))
        case 12:
            return ev.Waits(*of, epoch, state.slots.count(SlotState.COMPLETED))
        case 13:
            return ev.Registered(*of, epoch, dice.choice("ab"))
        case 14:
            return ev.Stepped(*of, epoch, 1)
        case 15:
            return ev.Condemned(*of, "its GPU is in error")
    holding = Holding("a", dice.choice((None, 1, 2)))
    return ev.Arrived(*of, epoch, state.finished_calls + 1, holding=holding)
