"""What a job keeps so that it need not search must always be what a search would find."""

from __future__ import annotations

from hyperpodrun.control.job import shard_table
from hyperpodrun.control.job.commands import Layout
from hyperpodrun.control.job.places import Nodes, Places
from hyperpodrun.control.job.slots import GONE, Slots, SlotState
from hyperpodrun.control.job.state import JobState


def check_files(job: JobState) -> None:
    """Every counter, set and table, against a search through all ranks and nodes."""
    _check_slots(job.slots)
    _check_places(job)
    assert job.nodes._confirmed == Nodes({node: job.nodes[node] for node in job.nodes})._confirmed
    for epoch in range(-1, job.next_epoch + 2):
        assert job.nodes.who_know(epoch) == sum(job.nodes[node].confirmed >= epoch for node in job.nodes)
    assert job.shards.packed() == shard_table._packed(job.shards)


def _check_slots(slots: Slots) -> None:
    assert [slot.rank for slot in slots] == list(range(len(slots)))
    for state in SlotState:
        assert slots.ranks(state) == [slot.rank for slot in slots if slot.state is state]
        assert slots.count(state) == len(slots.ranks(state))
        assert slots.all_are(state) == all(slot.state is state for slot in slots)
    assert slots.all_gone == all(slot.state in GONE for slot in slots)
    lost = [slot for slot in slots if slot.state is SlotState.LOST]
    assert slots.to_replace() == [slot.rank for slot in lost if slot.node is not None]
    comes = [slot for slot in slots if slot.state in (SlotState.STARTING, SlotState.BETWEEN)]
    assert slots.without_deadline() == [slot.rank for slot in comes if slot.due is None]
    assert slots.awaited() == [slot for slot in slots if slot.due is not None]
    dues = [slot.due for slot in slots if slot.due is not None]
    assert slots.next_due() == min(dues, default=None)
    for now in {*dues, -1.0}:
        assert slots.overdue(now) == [slot for slot in slots if slot.due is not None and slot.due <= now]
    assert slots.returned_early() == any(slot.left for slot in slots if slot.state is SlotState.COMPLETED)
    running = [slot for slot in slots if slot.state is SlotState.RUNNING]
    for returned in {slot.waits for slot in running} | {1, 2}:
        if returned:
            assert slots.waiting_for(returned) == sum(slot.waits == returned for slot in running)
    for slot in slots:
        if slot.incarnation >= 0:
            assert slots.of_process(slot.incarnation) is slot
    assert set(slots._by_incarnation) == {slot.incarnation for slot in slots} - {-1}
    assert slots.newest_spawn == max((slot.spawn_epoch for slot in slots), default=-1)


def _check_places(job: JobState) -> None:
    places: Places = job.places
    held = {place.node: index for index, place in enumerate(places) if place.node is not None}
    assert {node: places.held_by(node) for node in held} == held
    assert places.held == len(held)
    assert places.holders() == list(held)
    assert places.holes == [index for index, place in enumerate(places) if place.node is None]
    assert places.has_holes == bool(places.holes)
    spares = sorted(node for node in job.nodes if node not in held)
    assert job.spares() == spares
    assert job.has_spares == bool(spares)
    first = 0
    for index, place in enumerate(places):
        own = job.slots_of(index)
        assert [slot.rank for slot in own] == list(range(first, first + place.workers))
        assert {(slot.place, slot.node) for slot in own} <= {(index, place.node)}
        first += place.workers
        same = [other for other in range(len(places)) if places[other].role == place.role]
        assert places.layout_of(index) == Layout(
            world_size=len(job.slots),
            nodes=len(places),
            node_rank=index,
            local_world_size=place.workers,
            role_rank=sum(places[other].workers for other in same if other < index),
            role_world_size=sum(places[other].workers for other in same),
        )
    assert first == len(job.slots)
