"""Where a loop was when a step began, and what lay between that step and the one before it.

After the update of a step a loop logs, evaluates and saves before the next step begins. So there are two states of the
loop at one step: `before` all that, and `now`, when the next step began. A step that has begun on all ranks goes on
from `now`: nothing is repeated. Otherwise all ranks go back to `before` and do all of it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...checkpointless.state.provider import Skeleton, StateProvider

Values = dict[str, Any]
"""Plain values and tensors."""


class Place(StateProvider):
    """Registered beside model and optimizer; has no tensors to move.

    `shared` is the same on all ranks and comes from a replica, `mine` is this rank's own. What is in `mine` must be
    final before the last backward pass of a step: of what comes later a lost process leaves no note.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Another entry of the function: the loop has not begun."""
        self.shared: Values = {}
        self.mine: Values = {}

    def settle(self, shared: Values, mine: Values) -> None:
        """The step has been ended, or is about to end: nothing of what follows it has happened."""
        self.shared, self.mine = {"now": shared}, {"now": mine}

    def foresee(self, mine: Values) -> None:
        """What this rank's own values will be when the step is over; a lost process leaves them. Those that all ranks
        share stay what they are: until then the step may have to begin again."""
        self.mine = {"now": mine}

    def follow(self, shared: Values, mine: Values, before: Values) -> None:
        """What followed it is over. `before`: how this rank found it, beside what was settled."""
        self.shared = {"now": shared, "before": self.shared["now"]}
        self.mine = {"now": mine, "before": {**self.mine["now"], **before}}

    def at(self, *, repeats: bool) -> tuple[Values, Values]:
        """Shared and own values with which to go on. `repeats`: with all that follows the update."""
        return _of(self.shared, repeats), _of(self.mine, repeats)

    # ---- StateProvider ---------------------------------------------------------------------------------------------

    def named_tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def materialise(self, skeleton: Skeleton) -> None:
        pass

    def versions(self) -> int:
        return 0

    def host_state(self) -> Values:
        return {"shared": self.shared}

    def load_host_state(self, state: Mapping[str, Any]) -> None:
        self.shared = state["shared"]

    def rank_state(self) -> Values:
        return {"mine": self.mine}

    def load_rank_state(self, state: Mapping[str, Any]) -> None:
        self.mine = state["mine"]


def _of(values: Values, repeats: bool) -> Values:
    found: Values = values["before"] if repeats and "before" in values else values.get("now", {})
    return found
