"""Which faults: seeded, so that a run can be had again, and only where the undisturbed run shows that one can fire."""

from __future__ import annotations

import random

from ..testing.grammar import PLACES, Injection
from .records import RankRecord

KINDS = ("raise", "kill")


def plan(records: dict[int, RankRecord], count: int, seed: int) -> list[str]:
    """One fault for each run. Places take turns, so that few runs see all, and kinds; ranks and steps are drawn.

    Not in the last step: a rank that is cut off after its update has no record of that step, and it would be the one
    to compare. A single rank is not killed: nobody else has its state.
    """
    dice = random.Random(seed)
    kinds = KINDS if len(records) > 1 else KINDS[:1]
    where = {place: _steps(records, place) for place in PLACES}
    places = [place for place in PLACES if where[place]]
    dice.shuffle(places)
    faults = []
    for number in range(count if places else 0):
        lap, turn = divmod(number, len(places))
        kind, place = kinds[(lap + turn) % len(kinds)], places[turn]
        faults.append(str(Injection(kind, dice.choice(sorted(records)), dice.choice(where[place]), place)))
    return faults


def _steps(records: dict[int, RankRecord], place: str) -> list[int]:
    """Those in which every rank comes to the place."""
    last = min(record.last_step for record in records.values())
    first = next(iter(records.values()))
    return [
        step
        for step in sorted(first.places)
        if step < last and all(place in record.places.get(step, ()) for record in records.values())
    ]
