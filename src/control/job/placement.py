"""Which node holds which ranks: filling the place of a lost node, shrinking the world, growing it.

Ranks stay where they are. A spare takes the whole place of a lost node; when the world shrinks, the last place moves
into the hole, so that no more than its ranks change; when it grows, a place is added at the end. These functions
change the values; `nodes.py` says when.
"""

from __future__ import annotations

from msgspec.structs import replace

from .commands import Layout
from .state import JobState, NodeState, Place, Slot, SlotState


def forget_node(job: JobState, node: int) -> list[Slot]:
    """A node is gone and its place empty. The slots whose process was lost with it."""
    job.nodes.pop(node, None)
    job.hooks.discard(node)
    job.agreed = False
    for place in job.places:
        if place.node == node:
            place.node = None
    lost = []
    for slot in job.slots:
        if slot.node != node:
            continue
        slot.node = None
        if not slot.gone:
            slot.leave(SlotState.LOST)
            lost.append(slot)
    return lost


def fill_holes(job: JobState) -> None:
    """Spares take the places of lost nodes, as far as they fit."""
    if not job.agreed:
        return
    for index, place in enumerate(job.places):
        if place.node is None:
            fitting = [node for node in job.spares() if _fits(job.nodes[node], place)]
            if fitting:
                place.node = fitting[0]
                place.role = job.nodes[place.node].role
                _change_owners(job)
                for slot in slots_of(job, index):
                    slot.node = place.node


def _fits(node: NodeState, place: Place) -> bool:
    return node.workers == place.workers and place.role in (None, node.role)


def grow(job: JobState) -> list[Slot]:
    """Spares get places of their own as long as the world may be larger; the new slots."""
    new: list[Slot] = []
    if not job.agreed or job.has_holes:
        return new
    for node in job.spares():
        if len(job.places) >= job.config.max_nodes:
            break
        place = Place(node, job.nodes[node].workers, job.nodes[node].role)
        job.places.append(place)
        _change_owners(job)
        for local_rank in range(place.workers):
            new.append(Slot(len(job.slots), node=node, local_rank=local_rank, place=len(job.places) - 1))
            job.slots.append(new[-1])
    return new


def can_grow(job: JobState) -> bool:
    """Whether `grow` would do something."""
    return job.agreed and not job.has_holes and bool(job.spares()) and len(job.places) < job.config.max_nodes


def shrink(job: JobState) -> bool:
    """The world without its holes, if it may be so small. Whoever gets a new rank keeps his process."""
    if not job.agreed or len(job.places) - sum(place.node is None for place in job.places) < job.config.min_nodes:
        return False
    parts = [(place, slots_of(job, index)) for index, place in enumerate(job.places)]
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
    job.places = [place for place, _ in parts]
    job.slots = [slot for _, slots in parts for slot in slots]
    for index, (_, slots) in enumerate(parts):
        for slot in slots:
            slot.place = index
    shards = {rank: job.shards[slot.rank] for rank, slot in enumerate(job.slots) if slot.rank in job.shards}
    job.shards = shards
    for rank, slot in enumerate(job.slots):
        if slot.rank != rank:
            slot.former_ranks = (*slot.former_ranks, slot.rank)
        slot.rank = rank
        if slot.holding is not None:  # snapshots are known by ranks of the larger world
            slot.holding = replace(slot.holding, snapshots=())
    job.hole_due = None
    _change_owners(job)
    return True


def expect_nodes(job: JobState, now: float) -> bool:
    """Whether somebody must come to take a place; from the first time on that has a deadline."""
    if not job.has_holes:
        job.hole_due = None
    elif job.hole_due is None:
        job.hole_due = now + job.config.join_timeout
        job.dues_moved += 1
    return job.has_holes


def _change_owners(job: JobState) -> None:
    """The keys of an epoch belong to the nodes it was opened with. For others it needs another number."""
    if job.opened == job.next_epoch:
        job.next_epoch += 1


def slots_of(job: JobState, index: int) -> list[Slot]:
    """The slots of one place."""
    first = sum(place.workers for place in job.places[:index])
    return job.slots[first : first + job.places[index].workers]


def layout_of(job: JobState, place: int) -> Layout:
    """What the workers of a place are told of the world."""
    own = job.places[place]
    same = [index for index, other in enumerate(job.places) if other.role == own.role]
    return Layout(
        world_size=len(job.slots),
        nodes=len(job.places),
        node_rank=place,
        local_world_size=own.workers,
        role_rank=sum(job.places[index].workers for index in same if index < place),
        role_world_size=sum(job.places[index].workers for index in same),
    )
