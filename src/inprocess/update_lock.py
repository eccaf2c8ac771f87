"""The critical section in which parameters change, and whether this process's state is whole.

Idea: HyperPod's ParameterUpdateLock. There it is held by hand and waited for by the clock; here torch's global
optimizer hooks hold it around every `step()` of every optimizer, and an interrupt waits just as long as it lasts.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from .interrupt import InterruptGate


class ParameterUpdateLock:
    """`with lock:` around code that changes parameters: it is let finish, and if it cannot, the state is not whole.

    Not a mutex: only the main thread updates parameters. It also counts completed updates, in optimizer steps.
    """

    def __init__(self, gate: InterruptGate) -> None:
        self._gate = gate
        self._depth = 0
        self._torn = False
        self.steps = 0
        """Optimizer steps completed in this process, or, after a restore, in the state it holds."""

    def __enter__(self) -> ParameterUpdateLock:
        self._gate.enter_section()
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._depth == 0:  # released by force meanwhile
            return
        if kind is not None:
            self._torn = True
        self._depth -= 1
        self._gate.leave_section()

    def is_healthy(self) -> bool:
        """Whether the state is whole, so that it can be given to others. False inside an unfinished update."""
        return not self._torn and self._depth == 0

    def force_release(self) -> None:
        """User code is left: an update that is still open will never be finished."""
        if self._depth:
            self._torn = True
        self._depth = 0

    def begin_restore(self, steps: int) -> None:
        """State is to come from somebody who stands at `steps`: it is not whole until `restored`."""
        self._torn = True
        self.steps = steps

    def restored(self, steps: int | None = None) -> None:
        """The state is whole (again). Also from inside an update: that goes on, and its section with it."""
        self._torn = False
        if steps is not None:
            self.steps = steps


class OptimizerHooks:
    """Puts the lock around every step of every torch optimizer, and tells when one has completed."""

    def __init__(self, lock: ParameterUpdateLock, before_update: Callable[[], None], on_step: Any) -> None:
        """`before_update` is called while nothing has changed yet, and may raise."""
        self._lock = lock
        self._before_update = before_update
        self._on_step = on_step
        self._handles: list[Any] = []

    def install(self) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        if not self._handles:
            self._handles = [
                register_optimizer_step_pre_hook(self._before),
                register_optimizer_step_post_hook(self._after),
            ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._before_update()
        self._lock.__enter__()

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._on_step()
        self._lock.__exit__(None, None, None)
