"""Which followers have been silent for too long. Pure; looks at all of them at a deadline only."""

from __future__ import annotations

from collections.abc import Collection, Set

from ..roles import NodeConfig
from .directing import Progress

_NEARLY = 0.9


class Liveness:
    """Of one controller. `due`: nobody has been silent for too long before that."""

    def __init__(self, config: NodeConfig, voters: Set[str], now: float) -> None:
        """`voters`: the keys of who is certainly there."""
        self._config = config
        self._voters = voters
        self.due = now + config.heartbeat_limit
        self.enough = False
        """A majority has reported: the others are not waited for as long."""
        self.has_job = False

    def limit(self, follower: Progress) -> float:
        """How long it may be silent. Until the job is taken over, who may not be there has less time.

        Who has voted is there, and so may be who is needed for a majority.
        """
        may_not_be_there = follower.report is None and follower.member.key not in self._voters
        if self.enough and not self.has_job and may_not_be_there:
            return self._config.takeover_grace
        return self._config.heartbeat_limit

    def silent(self, followers: Collection[Progress], now: float) -> list[Progress]:
        """Who has been silent nearly as long as another is lost with it: of a rack, at once and not one by one."""
        if now < self.due:
            return []
        is_due = any(now >= follower.heard + self.limit(follower) for follower in followers)
        part = _NEARLY if is_due else 1.0
        return [follower for follower in followers if now >= follower.heard + part * self.limit(follower)]

    def look_again(self, followers: Collection[Progress], now: float) -> None:
        """When the first of them can have been silent for too long."""
        dues = (follower.heard + self.limit(follower) for follower in followers)
        self.due = min(dues, default=now + self._config.heartbeat_limit)

    def joins(self, follower: Progress) -> None:
        self.due = min(self.due, follower.heard + self.limit(follower))
