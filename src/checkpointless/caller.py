"""What recovery needs of the entry into the wrapped function, and its stand-in where there is none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from ..protocol.plan import RestorePlan


class Caller(Protocol):
    """The part of HPCallWrapper that state and its recovery have to do with."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def plan(self) -> RestorePlan | None: ...

    def restoring(self) -> AbstractContextManager[None]: ...

    def registered(self, shard: str) -> None:
        """Tells which shard this rank holds."""

    def step_completed(self, step: int | None = None) -> None:
        """Tells that so many steps are complete."""

    def enter_update(self) -> None:
        """From here on the state is not whole: an interrupt waits for `leave_update`."""

    def leave_update(self) -> None: ...

    def open_pass(self) -> None:
        """Something has changed in this pass of the loop: an interrupt waits for its end, if it can end."""

    def presume_pass(self) -> None:
        """What is left of the pass is taken to change nothing: an interrupt waits for moments only."""

    def close_pass(self) -> None:
        """The pass is over; leaves user code if the epoch has failed."""

    def holds(self, step: int, digests: Mapping[str, str]) -> None:
        """Tells what the tensors of each replica group hold at `step`, for the comparison with the other ranks."""

    def finish_gradients(self) -> None:
        """Waits until what is about to change the parameters is there; leaves user code if the epoch has failed."""


class NoCaller:
    """Outside HPWrapper, and under any other launcher: nothing is interrupted, nothing is planned."""

    plan: RestorePlan | None = None

    @property
    def rank(self) -> int:
        return int(os.environ.get("RANK", "0"))

    @property
    def world_size(self) -> int:
        return int(os.environ.get("WORLD_SIZE", "1"))

    def restoring(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def registered(self, shard: str) -> None:
        pass

    def step_completed(self, step: int | None = None) -> None:
        pass

    def enter_update(self) -> None:
        pass

    def leave_update(self) -> None:
        pass

    def finish_gradients(self) -> None:
        pass

    def open_pass(self) -> None:
        pass

    def presume_pass(self) -> None:
        pass

    def close_pass(self) -> None:
        pass

    def holds(self, step: int, digests: Mapping[str, str]) -> None:
        pass
