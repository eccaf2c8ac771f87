"""The recovery plan, as control makes it and workers carry it out."""

from __future__ import annotations

import msgspec

NO_EPOCH = -1
"""The epoch of a process that has not run in any."""


class RestorePlan(msgspec.Struct, frozen=True):
    """Where the state of a new epoch comes from.

    `target_step`: optimizer steps completed in the state to go on from. `source`: a rank that holds it, or None when
    nobody does and training starts afresh. `receivers`: the ranks that do not hold it (new processes, ranks a step
    behind, ranks interrupted inside their update).
    """

    target_step: int
    source: int | None
    receivers: tuple[int, ...]
