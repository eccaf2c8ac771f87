"""Lines that somebody outside can cause as often as he likes: one a minute of each kind, with how many were left out.

No clock of its own: the time comes in. Called by: whoever logs what a stranger has done.
"""

from __future__ import annotations

EVERY_S = 60.0
_KINDS = 1000
"""So many kinds are told apart; of more, the one that was said longest ago is forgotten."""


class Seldom:
    """Says which lines are due."""

    def __init__(self, every_s: float = EVERY_S) -> None:
        self._every_s = every_s
        self._kinds: dict[str, list[float]] = {}
        """When a line of the kind was last said, and how many were left out since."""

    def due(self, kind: str, now: float) -> int | None:
        """How many lines of this kind have been left out since the last; None: this one is to be left out, too."""
        known = self._kinds.get(kind)
        if known is not None and now < known[0] + self._every_s:
            known[1] += 1
            return None
        self._kinds.pop(kind, None)
        if len(self._kinds) >= _KINDS:
            del self._kinds[next(iter(self._kinds))]
        self._kinds[kind] = [now, 0]
        return 0 if known is None else int(known[1])
