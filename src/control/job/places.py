"""Who holds which part of the world, and who is there beside: the places, filed by what is asked at every event.

Owns: `Place`, `NodeState` and the files kept of them. Must never: decide which node gets a place (`placement.py`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, KeysView, Mapping

import msgspec

from ...protocol.plan import NO_EPOCH
from .commands import Layout


class Place(msgspec.Struct):
    """One node's share of the world: `workers` ranks in a row. `node`: who holds it, None while nobody does."""

    node: int | None
    workers: int
    role: str | None = None
    """Of its workers; None: the node was lost with the controller, and nobody knows."""


class Places:
    """The places in the order of their ranks. Two are equal if their places are: the rest follows from those."""

    def __init__(self, places: Iterable[Place] = ()) -> None:
        self._places = list(places)
        self._refile()

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Place]:
        return iter(self._places)

    def __getitem__(self, index: int) -> Place:
        return self._places[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Places) and self._places == other._places

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._places)

    # ---- changes -----------------------------------------------------------------------------------------------

    def append(self, place: Place) -> None:
        """At the end of the world."""
        self._places.append(place)
        self._enter(len(self._places) - 1, place)
        self._layouts.clear()

    def vacate(self, node: int) -> int | None:
        """The node is gone; the index of the place that it leaves, if it had one."""
        index = self._held_by.pop(node, None)
        if index is not None:
            self._places[index].node = None
            self._holes.add(index)
        return index

    def fill(self, index: int, node: int, role: str) -> None:
        """A node takes a hole."""
        place = self._places[index]
        if place.role != role:
            self._layouts.clear()
        place.node, place.role = node, role
        self._held_by[node] = index
        self._holes.discard(index)

    def replace_all(self, places: Iterable[Place]) -> None:
        """The world is another."""
        self._places = list(places)
        self._refile()

    def _refile(self) -> None:
        self._held_by: dict[int, int] = {}
        self._holes: set[int] = set()
        self._firsts: list[int] = []
        self._world_size = 0
        self._layouts: list[Layout] = []
        """Empty until they are asked for."""
        for index, place in enumerate(self._places):
            self._enter(index, place)

    def _enter(self, index: int, place: Place) -> None:
        self._firsts.append(self._world_size)
        self._world_size += place.workers
        if place.node is None:
            self._holes.add(index)
        else:
            self._held_by[place.node] = index

    # ---- questions ---------------------------------------------------------------------------------------------

    @property
    def holes(self) -> list[int]:
        """The places that nobody holds, ascending."""
        return sorted(self._holes)

    @property
    def has_holes(self) -> bool:
        return bool(self._holes)

    @property
    def held(self) -> int:
        """How many places somebody holds."""
        return len(self._held_by)

    @property
    def holding(self) -> KeysView[int]:
        """The nodes that hold places."""
        return self._held_by.keys()

    def held_by(self, node: int) -> int | None:
        """The index of the node's place."""
        return self._held_by.get(node)

    def holders(self) -> list[int]:
        """The nodes that hold places, in the order of those."""
        return [place.node for place in self._places if place.node is not None]

    def ranks_of(self, index: int) -> range:
        """The ranks of one place."""
        return range(self._firsts[index], self._firsts[index] + self._places[index].workers)

    def layout_of(self, index: int) -> Layout:
        """What the workers of a place are told of the world; of all places at once, and once for each world."""
        if not self._layouts:
            self._layouts = self._all_layouts()
        return self._layouts[index]

    def _all_layouts(self) -> list[Layout]:
        of_role: defaultdict[str | None, int] = defaultdict(int)
        for place in self._places:
            of_role[place.role] += place.workers
        before: defaultdict[str | None, int] = defaultdict(int)
        layouts = []
        for index, place in enumerate(self._places):
            layouts.append(
                Layout(
                    world_size=self._world_size,
                    nodes=len(self._places),
                    node_rank=index,
                    local_world_size=place.workers,
                    role_rank=before[place.role],
                    role_world_size=of_role[place.role],
                )
            )
            before[place.role] += place.workers
        return layouts


class NodeState(msgspec.Struct):
    """A member, with ranks or as a spare. `confirmed`: the highest epoch number that it is known to know."""

    workers: int
    role: str = "default"
    confirmed: int = NO_EPOCH


class Nodes:
    """The members by number, and how many of them know which epoch."""

    def __init__(self, nodes: Mapping[int, NodeState] | None = None) -> None:
        self._nodes = dict(nodes or {})
        self._confirmed = Counter(node.confirmed for node in self._nodes.values())

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[int]:
        return iter(self._nodes)

    def __contains__(self, node: object) -> bool:
        return node in self._nodes

    def __getitem__(self, node: int) -> NodeState:
        return self._nodes[node]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Nodes) and self._nodes == other._nodes

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._nodes)

    @property
    def numbers(self) -> KeysView[int]:
        return self._nodes.keys()

    def admit(self, node: int, state: NodeState) -> None:
        self.forget(node)
        self._nodes[node] = state
        self._confirmed[state.confirmed] += 1

    def forget(self, node: int) -> None:
        before = self._nodes.pop(node, None)
        if before is not None:
            self._uncount(before.confirmed)

    def confirm(self, node: int, epoch: int) -> None:
        """A member knows the number of an epoch."""
        state = self._nodes[node]
        if epoch > state.confirmed:
            self._uncount(state.confirmed)
            self._confirmed[epoch] += 1
            state.confirmed = epoch

    def _uncount(self, epoch: int) -> None:
        self._confirmed[epoch] -= 1
        if not self._confirmed[epoch]:
            del self._confirmed[epoch]  # so that there are never more numbers than members know

    def who_know(self, epoch: int) -> int:
        """How many know the number of an epoch, or a higher one."""
        return sum(count for number, count in self._confirmed.items() if number >= epoch)
