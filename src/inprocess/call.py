"""What a wrapped function is given: its epoch, its recovery plan, and ways to say what must not be interrupted."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ..protocol import messages
from ..protocol.plan import RestorePlan

if TYPE_CHECKING:
    from .session import Session
    from .update_lock import ParameterUpdateLock


class HPCallWrapper:
    """One entry into a wrapped function. Outside hyperpodrun it is inert: epoch 0, no plan, no restart."""

    def __init__(self, session: Session | None = None, epoch: int = 0, plan: RestorePlan | None = None) -> None:
        self._session = session
        self.epoch = epoch
        """The attempt of the whole job, counted from 0; also in JOB_RESTART_COUNT."""
        self.plan = plan
        """The state to go on from, and what this rank has to give or to receive of it; None when nothing was lost."""

    @property
    def rank(self) -> int:
        """This process's rank in this epoch; 0 where there is no launcher."""
        return int(os.environ.get("RANK", "0"))

    @property
    def world_size(self) -> int:
        """The number of ranks in this epoch; 1 where there is no launcher."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def inprocess(self) -> bool:
        """Whether this function is re-entered after a fault."""
        return self._session is not None

    @property
    def step(self) -> int:
        """Optimizer steps completed in the state this process holds, or will hold after the restore of the plan."""
        return 0 if self._session is None else self._session.lock.steps

    @property
    def update_lock(self) -> ParameterUpdateLock | None:
        """The lock that torch optimizers hold in `step()`, for code that changes parameters without one."""
        return None if self._session is None else self._session.lock

    def step_completed(self, step: int | None = None) -> None:
        """Tells of a completed step, the `step`-th if that is given. Only for training without torch optimizers and
        without a CheckpointManager: those are seen by themselves."""
        if self._session is not None:
            self._session.step_completed(step)

    def registered(self, shard: str) -> None:
        """Tells which shard of the state this rank holds; ranks with the same one hold the same bytes."""
        if self._session is not None:
            self._session.monitor.send(messages.Registered(self.epoch, shard))

    def enter_update(self) -> None:
        """Parameters change from here on; an interrupt waits for `leave_update` as long as there is progress."""
        if self._session is not None:
            self._session.lock.__enter__()

    def leave_update(self) -> None:
        """Raises Interrupted when the epoch has failed meanwhile."""
        if self._session is not None:
            self._session.lock.__exit__(None, None, None)

    def open_pass(self) -> None:
        """Something has changed in this pass of the loop: an interrupt waits for its end, if it can end."""
        if self._session is not None:
            self._session.gate.open_pass()

    def presume_pass(self) -> None:
        """What is left of the pass is taken to change nothing: an interrupt waits for moments only."""
        if self._session is not None:
            self._session.gate.presume_pass()

    def close_pass(self) -> None:
        """The pass is over. Raises Interrupted when the epoch has failed meanwhile."""
        if self._session is not None:
            self._session.gate.close_pass()

    def holds(self, step: int, digests: Mapping[str, str]) -> None:
        """Tells what this rank's tensors hold at `step`: by replica group, a digest."""
        if self._session is not None:
            self._session.monitor.send(messages.Holds(self.epoch, step, dict(digests)))

    def finish_gradients(self) -> None:
        """To be called before parameters are changed without a torch optimizer: see `Session.finish_gradients`."""
        if self._session is not None:
            self._session.finish_gradients()

    @contextlib.contextmanager
    def atomic(self) -> Iterator[None]:
        """A critical section: an interrupt waits for its end, as long as it makes progress."""
        if self._session is None:
            yield
            return
        self._session.gate.enter_section()
        try:
            yield
        finally:
            self._session.gate.leave_section()

    @contextlib.contextmanager
    def restoring(self) -> Iterator[None]:
        """Around the code that brings state to where `plan` says; its time is the phase `restore` of the report.

        A rank that is to receive state is a source for others only once it has left this block in good order.
        """
        if self._session is None:
            yield
            return
        self._session.restore_begin_ns = time.monotonic_ns()
        yield
        self._session.lock.restored()
        self._session.restore_end_ns = time.monotonic_ns()
