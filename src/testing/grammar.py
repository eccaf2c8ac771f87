"""What a fault is called: `KIND:rank=R,step=S[,where=PLACE]`, and several of them separated by `;`.

What has fired must be known without memory: the process that remembers may be the one that dies. The rule: the
injections, in the order in which they are due, form *events*, and event n fires in epoch n only. An event ends its
epoch, so the epoch's number tells a re-entered and a respawned process alike how many have fired.

Different ranks at the same point of the same step are one event; a rank named there twice makes two. All places after
the gradients are one point: no collective has to separate them.

So an injection never fires twice. It is sure to fire only if the injections are the job's only faults: a foreign fault
uses up an epoch's number, and an event that the job never reaches holds up those behind it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

KINDS = ("raise", "kill", "segv", "exit", "hang", "assert")
PLACES = {"forward": 0, "backward": 1, "before-update": 2, "in-update": 2, "after-update": 2}
"""By name: the point within a step."""
ALIASES = {"optimizer": "in-update", "between": "after-update"}
"""What examples/gpt calls them."""

_NAMES = (*PLACES, *ALIASES)
_SYNTAX = re.compile(rf"({'|'.join(KINDS)}):rank=(\d+),step=(\d+)(?:,where=({'|'.join(_NAMES)}))?")


@dataclass(frozen=True)
class Injection:
    """One fault, of one rank."""

    kind: str
    rank: int
    step: int
    where: str = "forward"

    @classmethod
    def parse(cls, text: str) -> Injection:
        """Raises ValueError with one sentence."""
        match = _SYNTAX.fullmatch(text)
        if not match:
            names = f"KIND one of {', '.join(KINDS)} and PLACE one of {', '.join(_NAMES)}"
            raise ValueError(f"{text!r} is not KIND:rank=R,step=S[,where=PLACE] with {names}")
        kind, rank, step, where = match.groups()
        return cls(kind, int(rank), int(step), ALIASES.get(where, where) or "forward")

    def __str__(self) -> str:
        return f"{self.kind}:rank={self.rank},step={self.step},where={self.where}"

    @property
    def point(self) -> tuple[int, int]:
        """When in the run it is due."""
        return self.step, PLACES[self.where]


def parse_injections(text: str) -> list[Injection]:
    """Several, separated by `;`. Raises ValueError with one sentence."""
    return [Injection.parse(part.strip()) for part in text.split(";") if part.strip()]


def numbered(injections: Iterable[Injection]) -> list[tuple[int, Injection]]:
    """Each with the number of its event, which is the epoch it fires in."""
    named: Counter[tuple[tuple[int, int], int]] = Counter()
    keyed = []
    for injection in sorted(injections, key=lambda injection: injection.point):
        times = named[injection.point, injection.rank]
        keyed.append(((injection.point, times), injection))
        named[injection.point, injection.rank] += 1
    keys = sorted({key for key, _ in keyed})
    return [(keys.index(key), injection) for key, injection in keyed]
