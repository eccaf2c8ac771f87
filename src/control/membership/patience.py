"""Who waits for a job to begin says for what: after some seconds, then more and more seldom."""

from __future__ import annotations

from .roles import Context

_EXPLAIN_EVERY_S = 60.0
WAITS = "waits"
"""The note of who waits. The shell adds where it listens and what it has tried."""


class Patience:
    """When that is said next."""

    def __init__(self, context: Context) -> None:
        self._began = context.now
        self._every = context.config.explain_after
        self.due = context.now + self._every

    def explain(self, context: Context, **fields: object) -> None:
        if context.now >= self.due:
            context.note(WAITS, seconds=round(context.now - self._began), **fields)
            self._every = min(2 * self._every, _EXPLAIN_EVERY_S)
            self.due = context.now + self._every
