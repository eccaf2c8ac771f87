"""Where two runs first differ: which object, on which rank, after which step.

Compared are, after every step that both runs have a record of, all registered objects and all global generators of
every rank; after the last step they must both have one. A global generator that nobody has seeded is left out. Then
what each rank declared with `testing.result`. A rank that declared nothing is taken by its output: a step that is
repeated prints its lines again, a rank that is cut off after an update does not print what follows it, and scripts say
where they resume; so it is not compared as a whole. The last line that both undisturbed runs have must be there.
"""

from __future__ import annotations

from dataclasses import dataclass

from .records import Digests, RankRecord

_NAMED = 3


@dataclass(frozen=True)
class Difference:
    """The first one."""

    rank: int
    step: int | None
    """None: at the end."""
    what: str

    def __str__(self) -> str:
        when = "at the end" if self.step is None else f"after step {self.step}"
        return f"{self.what} on rank {self.rank} {when}"


def unseeded(one: dict[int, RankRecord], other: dict[int, RankRecord]) -> frozenset[str]:
    """Global generators that two undisturbed runs find in other states: nobody has seeded them. Where training draws
    from one, other things differ as well."""
    return frozenset(
        name
        for rank in one.keys() & other.keys()
        for step, found in one[rank].steps.items()
        for name in found
        if name.startswith("generator.") and found[name] != other[rank].steps.get(step, found).get(name)
    )


def first_difference(
    one: dict[int, RankRecord], other: dict[int, RankRecord], left_out: frozenset[str] = frozenset()
) -> Difference | None:
    """Of states and declared results; None when they are equal."""
    for rank in sorted(one.keys() ^ other.keys()):
        return Difference(rank, None, "no record in one of the runs")
    steps = sorted({step for record in one.values() for step in record.steps})
    for step in steps:
        for rank in sorted(one):
            ours, theirs = one[rank].steps.get(step), other[rank].steps.get(step)
            names = _names(ours, theirs, left_out) if ours is not None and theirs is not None else ""
            if names:
                return Difference(rank, step, names)
    for rank in sorted(one):
        if one[rank].last_step != other[rank].last_step:
            last = f"the last step ({one[rank].last_step} in one run, {other[rank].last_step} in the other)"
            return Difference(rank, None, last)
    for rank in sorted(one):
        if one[rank].results != other[rank].results:
            ours = {f"result {name}": "".join(found.values()) for name, found in one[rank].results.items()}
            theirs = {f"result {name}": "".join(found.values()) for name, found in other[rank].results.items()}
            return Difference(rank, None, _names(ours, theirs))
    return None


def closing_lines(one: dict[int, RankRecord], other: dict[int, RankRecord]) -> dict[int, str]:
    """By rank that declared no result: the last line that two undisturbed runs both printed."""
    found = {}
    for rank in one.keys() & other.keys():
        if not one[rank].results:
            theirs = set(other[rank].lines)
            line = next((line for line in reversed(one[rank].lines) if line and line in theirs), None)
            if line is not None:
                found[rank] = line
    return found


def missing_line(lines: dict[int, str], records: dict[int, RankRecord]) -> Difference | None:
    """The first rank that did not print its closing line."""
    for rank in sorted(lines):
        if lines[rank] not in records[rank].lines:
            return Difference(rank, None, f"the printed line {lines[rank]!r}, which is missing,")
    return None


def _names(ours: Digests, theirs: Digests, left_out: frozenset[str] = frozenset()) -> str:
    """What differs; empty when nothing does."""
    if ours == theirs:
        return ""
    everything = [*ours, *sorted(theirs.keys() - ours.keys())]
    names = [name for name in everything if ours.get(name) != theirs.get(name) and name not in left_out]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"
