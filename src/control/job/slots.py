"""One slot per rank, filed by what is asked of the ranks at every event, so that nothing is searched for.

Owns: `Slot` and the files kept of all of them. Whoever changes a slot does it by `Slots.change`, or calls `refile` when
it has changed many. What an event costs then depends on what it brings about, not on the size of the world.
Must never: decide anything.
"""

from __future__ import annotations

import enum
import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import overload

import msgspec

from ...protocol.plan import NO_EPOCH, Holding


class SlotState(enum.Enum):
    """What the process of one rank does."""

    STARTING = "starting"
    """The process runs but has not reached the barrier of its first wrapped function (it may have none)."""
    WAITING = "waiting"
    """At the barrier."""
    RUNNING = "running"
    """In the wrapped function."""
    COMPLETED = "completed"
    """Returned from the wrapped function, waits for the others."""
    UNWINDING = "unwinding"
    """On its way from a failed epoch to the barrier."""
    BETWEEN = "between wrapped functions"
    """Past a wrapped function that returned everywhere."""
    KILLED = "killed"
    """Sent SIGKILL; what it still says does not count, and its end has yet to be seen."""
    EXITED = "exited"
    """Gone, with exit code 0, as it should be."""
    LOST = "lost"
    """Gone otherwise, or not started."""


GONE = frozenset({SlotState.EXITED, SlotState.LOST})
COMES_BY_ITSELF = frozenset({SlotState.STARTING, SlotState.BETWEEN})


class Slot(msgspec.Struct):
    """One rank: the process that holds it and what is known of it."""

    rank: int
    state: SlotState = SlotState.LOST
    node: int | None = 0
    """Where it is; None: its node was lost, and there is no other yet."""
    local_rank: int = 0
    place: int = 0
    """Its node's index among the places."""
    incarnation: int = -1
    spawn_epoch: int = NO_EPOCH
    """The epoch this process was started for; it may have written store keys of it before any barrier."""
    epoch: int = NO_EPOCH
    """The last epoch this process ran in; NO_EPOCH for a new process."""
    abort_timeout: float | None = None
    call: int = 0
    step: int = 0
    healthy: bool = True
    holding: Holding | None = None
    """What its CheckpointManager said it holds; None where the script has none."""
    spawned_at: float = 0.0
    waits: int = 0
    """So many others had returned from the wrapped function when it was seen to wait in torch.distributed; 0: it does
    not wait, or has not been asked."""
    left: str = ""
    """How it left the function's loop before its end; empty where it did not, or that is not known."""
    former_ranks: tuple[int, ...] = ()
    """Ranks that this same process had in larger worlds."""
    due: float | None = None
    """When this process must have reached the barrier, or be gone if it was killed."""
    killed_for: str = ""
    """Why this process was killed, once it has been."""

    @property
    def gone(self) -> bool:
        return self.state in GONE

    @property
    def fresh(self) -> bool:
        """The process has not run in any epoch: it holds no state."""
        return self.epoch == NO_EPOCH


class Slots:
    """The slots by rank. Two are equal if their slots are: the rest follows from those."""

    def __init__(self, slots: Iterable[Slot] = ()) -> None:
        self._slots = list(slots)
        self.refile()

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots)

    @overload
    def __getitem__(self, rank: int) -> Slot: ...
    @overload
    def __getitem__(self, rank: slice) -> list[Slot]: ...
    def __getitem__(self, rank: int | slice) -> Slot | list[Slot]:
        return self._slots[rank]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slots) and self._slots == other._slots

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._slots)

    # ---- changes -----------------------------------------------------------------------------------------------

    def change(self, slot: Slot, **fields: object) -> None:
        """The one way to change a slot that is in here."""
        self._take_out(slot)
        for name, value in fields.items():
            setattr(slot, name, value)
        self._file(slot)

    def leave(self, slot: Slot, state: SlotState) -> None:
        """The process is gone."""
        self.change(slot, state=state, due=None)

    def append(self, slot: Slot) -> None:
        """The next rank's."""
        self._slots.append(slot)
        self._enter(slot)

    def replace(self, slot: Slot) -> None:
        """Another process takes the rank."""
        before = self._slots[slot.rank]
        self._take_out(before)
        if self._by_incarnation.get(before.incarnation) is before:
            del self._by_incarnation[before.incarnation]
        self._slots[slot.rank] = slot
        self._enter(slot)

    def refile(self, slots: Iterable[Slot] | None = None) -> None:
        """After many were changed, or the ranks are others: O(ranks)."""
        if slots is not None:
            self._slots = list(slots)
        self._in: dict[SlotState, set[int]] = {state: set() for state in SlotState}
        self._at_home: set[int] = set()
        """Lost, and there is a node for another process."""
        self._undue: set[int] = set()
        """On their way to a barrier, without a deadline."""
        self._left_early: set[int] = set()
        """Completed, and said how."""
        self._waits: Counter[int] = Counter()
        """Of those who run: how many were seen to wait when so many had returned."""
        self._due: dict[float, set[int]] = {}
        self._due_next: list[float] = []
        """A heap; may have deadlines that nobody has any more."""
        self._by_incarnation: dict[int, Slot] = {}
        self.newest_spawn = NO_EPOCH
        """The last epoch that a process was started for."""
        for slot in self._slots:
            self._enter(slot)

    def _enter(self, slot: Slot) -> None:
        if slot.incarnation >= 0:
            self._by_incarnation[slot.incarnation] = slot
        self.newest_spawn = max(self.newest_spawn, slot.spawn_epoch)
        self._file(slot)

    def _file(self, slot: Slot) -> None:
        rank, state = slot.rank, slot.state
        self._in[state].add(rank)
        if slot.due is not None:
            ranks = self._due.get(slot.due)
            if ranks is None:
                self._due[slot.due] = ranks = set()
                heapq.heappush(self._due_next, slot.due)
            ranks.add(rank)
        elif state in COMES_BY_ITSELF:
            self._undue.add(rank)
        if state is SlotState.RUNNING:
            if slot.waits:
                self._waits[slot.waits] += 1
        elif state is SlotState.LOST:
            if slot.node is not None:
                self._at_home.add(rank)
        elif state is SlotState.COMPLETED and slot.left:
            self._left_early.add(rank)

    def _take_out(self, slot: Slot) -> None:
        rank, state = slot.rank, slot.state
        self._in[state].remove(rank)
        if slot.due is not None:
            ranks = self._due[slot.due]
            ranks.remove(rank)
            if not ranks:
                del self._due[slot.due]
        elif state in COMES_BY_ITSELF:
            self._undue.remove(rank)
        if state is SlotState.RUNNING:
            if slot.waits:
                self._waits[slot.waits] -= 1
                if not self._waits[slot.waits]:
                    del self._waits[slot.waits]
        elif state is SlotState.LOST:
            self._at_home.discard(rank)
        elif state is SlotState.COMPLETED:
            self._left_early.discard(rank)

    # ---- questions ---------------------------------------------------------------------------------------------

    def count(self, state: SlotState) -> int:
        return len(self._in[state])

    def all_are(self, state: SlotState) -> bool:
        return len(self._in[state]) == len(self._slots)

    @property
    def all_gone(self) -> bool:
        return sum(len(self._in[state]) for state in GONE) == len(self._slots)

    def ranks(self, *states: SlotState) -> list[int]:
        """The ranks in one of these states, ascending."""
        return sorted(rank for state in states for rank in self._in[state])

    def to_replace(self) -> list[int]:
        """The lost ranks that have a node, ascending."""
        return sorted(self._at_home)

    def without_deadline(self) -> list[int]:
        """The ranks that are on their way to a barrier, nobody having set them a deadline; ascending."""
        return sorted(self._undue)

    def returned_early(self) -> bool:
        """Whether a rank that has returned from the function had left its loop before the end."""
        return bool(self._left_early)

    def waiting_for(self, returned: int) -> int:
        """How many of those who run were seen to wait when so many had returned."""
        return self._waits.get(returned, 0)

    def awaited(self) -> list[Slot]:
        """Those that have a deadline, by rank."""
        return [self._slots[rank] for rank in sorted(rank for ranks in self._due.values() for rank in ranks)]

    def next_due(self) -> float | None:
        """The earliest deadline."""
        while self._due_next and self._due_next[0] not in self._due:
            heapq.heappop(self._due_next)
        return self._due_next[0] if self._due_next else None

    def overdue(self, now: float) -> list[Slot]:
        """Those whose deadline has come, by rank."""
        late: set[int] = set()
        passed: list[float] = []
        while (due := self.next_due()) is not None and due <= now:
            passed.append(heapq.heappop(self._due_next))
            late |= self._due[due]
        for due in passed:
            heapq.heappush(self._due_next, due)
        return [self._slots[rank] for rank in sorted(late)]

    def of_process(self, incarnation: int) -> Slot | None:
        """The slot whose present process this is."""
        return self._by_incarnation.get(incarnation)
