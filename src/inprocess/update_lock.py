"""The critical section in which parameters change, and whether this process's state is whole.

Idea: HyperPod's ParameterUpdateLock. There it is held by hand and waited for by the clock; here torch's global
optimizer hooks hold it around every `step()` of every optimizer, and an interrupt waits just as long as it lasts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from ..protocol.deepspeed import refuse_in_use
from .interrupt import InterruptGate, is_on_stack


class ParameterUpdateLock:
    """`with lock:` around code that changes parameters: it is let finish, and if it cannot, the state is not whole.

    Not a mutex: only the main thread updates parameters. It also counts completed updates, in optimizer steps.
    """

    def __init__(self, gate: InterruptGate) -> None:
        self._gate = gate
        self._owners: list[FrameType | None] = []
        self._torn = False
        self.steps = 0
        """Optimizer steps completed in this process, or, after a restore, in the state it holds."""

    def __enter__(self) -> ParameterUpdateLock:
        return self.enter(None)

    def enter(self, owner: FrameType | None) -> ParameterUpdateLock:
        """The same, for a section that is over, whatever happens, when the frame `owner` is left."""
        self._gate.enter_section(owner)
        self._owners = [frame for frame in self._owners if frame is None or is_on_stack(frame, sys._getframe())]
        self._owners.append(owner)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None
    ) -> None:
        if not self._owners:  # released by force meanwhile
            return
        if kind is not None:
            self._torn = True
        self._owners.pop()
        self._gate.leave_section()

    def is_healthy(self) -> bool:
        """Whether the state is whole, so that it can be given to others. False inside an unfinished update."""
        return not self._torn and not self._owners

    def force_release(self) -> None:
        """User code is left: an update that is still open will never be finished."""
        if self._owners:
            self._torn = True
        self._owners.clear()

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
                register_optimizer_step_pre_hook(_outside_graphs(self._before)),
                register_optimizer_step_post_hook(_outside_graphs(self._after)),
            ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        refuse_in_use()
        self._before_update()
        self._lock.enter(_frame_of_step())

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._on_step()
        self._lock.__exit__(None, None, None)


def _frame_of_step() -> FrameType | None:
    """The frame of torch's that calls the hooks around an optimizer's step: when that is left by an exception, no hook
    is called any more."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.endswith("optim/optimizer.py"):
        frame = frame.f_back
    return frame


def _outside_graphs(hook: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
    """The hook for an optimizer whose step may be compiled: in a graph it would be run once, while it is traced."""
    torch = sys.modules["torch"]
    # As torch.compiler.disable, which would import torch._dynamo now, also for scripts that never need it (1.2 s).
    outside = torch._disable_dynamo(lambda *args: hook(*args))

    def call(optimizer: Any, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            outside(optimizer, args, kwargs)
        else:
            hook(optimizer, args, kwargs)

    return call
