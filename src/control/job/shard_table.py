"""Which ranks have registered which shard of the state, in a form that does not grow with the world."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

Packed = tuple[tuple[str, int, int, int], ...]
"""The name of a shard, its first rank, the stride, how many."""

MAX_RUNS = 4096
"""Of what is told to the other nodes."""


class ShardTable(dict[int, str]):
    """By rank. Ranks of one shard lie at equal distances, mostly; what comes of that is kept until a rank tells of
    another shard."""

    version = 0
    """Counts the changes."""
    _packed: Packed | None = None

    def tell(self, rank: int, shard: str) -> None:
        """A rank has registered."""
        if self.get(rank) != shard:
            self[rank] = shard
            self._change()

    def renumber(self, shards: Mapping[int, str]) -> None:
        """The ranks are others now, or nobody has registered yet."""
        if shards or self:
            self.clear()
            self.update(shards)
            self._change()

    def learn(self, packed: Packed) -> None:
        """What another controller has remembered."""
        for name, first, stride, count in packed:
            self.update(dict.fromkeys(range(first, first + stride * count, stride), name))
        self._change()

    def _change(self) -> None:
        self.version += 1
        self._packed = None

    def packed(self) -> Packed:
        """For the next controller. Of too many shards those are left out that nobody else has a copy of."""
        if self._packed is None:
            self._packed = _bounded(_packed(self))
        return self._packed


def _packed(shards: Mapping[int, str]) -> Packed:
    by_name: dict[str, list[int]] = {}
    for rank in sorted(shards):
        by_name.setdefault(shards[rank], []).append(rank)
    return tuple(run for name, ranks in by_name.items() for run in _runs(name, ranks))


def _runs(name: str, ranks: list[int]) -> Iterable[tuple[str, int, int, int]]:
    at = 0
    while at < len(ranks):
        stride = ranks[at + 1] - ranks[at] if at + 1 < len(ranks) else 1
        end = at + 1
        while end < len(ranks) and ranks[end] - ranks[end - 1] == stride:
            end += 1
        yield name, ranks[at], stride, end - at
        at = end


def _bounded(packed: Packed) -> Packed:
    if len(packed) <= MAX_RUNS:
        return packed
    return tuple(sorted(packed, key=lambda run: -run[3])[:MAX_RUNS])
