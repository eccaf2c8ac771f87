"""Which node holds which ranks: filling the place of a lost node, shrinking the world, growing it.

Ranks stay where they are. A spare takes the whole place of a lost node; when the world shrinks, the last place moves
into the hole, so that no more than its ranks change; when it grows, a place is added at the end. These functions
change the values; `nodes.py` says when.
"""

from __future__ import annotations

from msgspec.structs import replace

from .places import NodeState, Place
from .slots import Slot, SlotState
from .state import JobState


def forget_node(job: JobState, node: int) -> list[Slot]:
    """A node is gone and its place empty. The slots whose process was lost with it."""
    job.nodes.forget(node)
    job.hooks.discard(node)
    job.agreed = False
    index = job.places.vacate(node)
    lost = []
    for slot in [] if index is None else job.slots_of(index):
        if not slot.gone:
            lost.append(slot)
            job.slots.leave(slot, SlotState.LOST)
        job.slots.change(slot, node=None)
    return lost


def fill_holes(job: JobState) -> None:
    """Spares take the places of lost nodes, as far as they fit."""
    if not job.agreed or not job.places.has_holes:
        return
    spares = job.spares()
    for index in job.places.holes if spares else ():
        place = job.places[index]
        fitting = next((node for node in spares if _fits(job.nodes[node], place)), None)
        if fitting is None:
            continue
        spares.remove(fitting)
        job.places.fill(index, fitting, job.nodes[fitting].role)
        _change_owners(job)
        for slot in job.slots_of(index):
            job.slots.change(slot, node=fitting)


def _fits(node: NodeState, place: Place) -> bool:
    return node.workers == place.workers and place.role in (None, node.role)


def grow(job: JobState) -> list[Slot]:
    """Spares get places of their own as long as the world may be larger; the new slots."""
    new: list[Slot] = []
    if not job.agreed or job.places.has_holes:
        return new
    for node in job.spares():
        if len(job.places) >= job.config.max_nodes:
            break
        new += job.add_place(Place(node, job.nodes[node].workers, job.nodes[node].role))
        _change_owners(job)
    return new


def can_grow(job: JobState) -> bool:
    """Whether `grow` would do something."""
    return job.agreed and not job.places.has_holes and job.has_spares and len(job.places) < job.config.max_nodes


def shrink(job: JobState) -> bool:
    """The world without its holes, if it may be so small. Whoever gets a new rank keeps his process."""
    if not job.agreed or job.places.held < job.config.min_nodes:
        return False
    parts = [(place, job.slots_of(index)) for index, place in enumerate(job.places)]
    at = 0
    while at < len(parts):
        if parts[at][0].node is not None:
            at += 1
            continue
        while len(parts) > at + 1 and parts[-1][0].node is None:
            parts.pop()
        if len(parts) > at + 1 and parts[-1][0].workers == parts[at][0].workers:
            parts[at] = parts.pop()
        else:
            parts.pop(at)
    job.places.replace_all(place for place, _ in parts)
    for index, (_, own) in enumerate(parts):
        for slot in own:
            slot.place = index
    slots = [slot for _, own in parts for slot in own]
    job.shards.renumber({rank: job.shards[slot.rank] for rank, slot in enumerate(slots) if slot.rank in job.shards})
    for rank, slot in enumerate(slots):
        if slot.rank != rank:
            slot.former_ranks = (*slot.former_ranks, slot.rank)
        slot.rank = rank
        if slot.holding is not None:  # snapshots are known by ranks of the larger world
            slot.holding = replace(slot.holding, snapshots=())
    job.slots.refile(slots)
    job.hole_due = None
    _change_owners(job)
    return True


def expect_nodes(job: JobState, now: float) -> bool:
    """Whether somebody must come to take a place; from the first time on that has a deadline."""
    if not job.places.has_holes:
        job.hole_due = None
    elif job.hole_due is None:
        job.hole_due = now + job.config.join_timeout
        job.dues_moved += 1
    return job.places.has_holes


def _change_owners(job: JobState) -> None:
    """The keys of an epoch belong to the nodes it was opened with. For others it needs another number."""
    if job.opened == job.next_epoch:
        job.next_epoch += 1
