"""When is a module called, and when do its gradients begin to flow?

Asked of the module's output, which autograd's first hook of a backward pass is on. torch.compile cannot have that hook
in a graph (it would break the graph, which `fullgraph=True` forbids): the gradients of a compiled module are asked for
instead, of which the first one to arrive tells, before DDP can send it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class BackwardWatch:
    """Calls `on_backward` whenever a backward pass through the module begins, `on_forward` when a forward pass does,
    unless torch.compile has it in a graph."""

    def __init__(
        self, module: torch.nn.Module, on_backward: Callable[[], None], on_forward: Callable[[], None] | None = None
    ) -> None:
        self._on_backward = on_backward
        self._before = module.register_forward_pre_hook(_Calls(on_forward)) if on_forward is not None else None
        self._pass = -1
        self._outside: Callable[[Any], None] = torch.compiler.disable(self._watch_output)
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        # FSDP2 gives a parameter's gradient to it by hand, and no hook sees that.
        seen = [] if any(hasattr(parameter, "to_local") for parameter in parameters) else parameters
        self._bare = [parameter for parameter in seen if parameter._backward_hooks is None]
        self._on_gradients = [parameter.register_hook(self._before_gradient) for parameter in seen]
        self._on_output = not seen
        self._hook = module.register_forward_hook(self)

    def remove(self) -> None:
        self._hook.remove()
        if self._before is not None:
            self._before.remove()
        self._leave_gradients()

    def __call__(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """After a forward pass, or while torch.compile traces one."""
        if not (module.training and torch.is_grad_enabled()):
            return
        if not torch.compiler.is_compiling():
            if not self._on_output:
                self._on_output = True
                self._leave_gradients()
            self._watch_output(output)
        elif self._on_output:
            self._outside(output)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the module, made by `copy.deepcopy` or `torch.save`, is not the one that is trained here."""
        return _Unwatched, ()

    def _watch_output(self, output: Any) -> None:
        tensor = _first_with_gradient(output)
        if tensor is not None:
            tensor.register_hook(self._before_output)

    def _before_output(self, gradient: torch.Tensor) -> None:
        self._on_backward()

    def _before_gradient(self, gradient: torch.Tensor) -> None:
        number = torch._C._current_graph_task_id()
        if number != self._pass:
            self._pass = number
            self._on_backward()

    def _leave_gradients(self) -> None:
        for handle in self._on_gradients:
            handle.remove()
        self._on_gradients.clear()
        for parameter in self._bare:
            if not parameter._backward_hooks:
                parameter._backward_hooks = None  # or autograd would look for hooks there, 0.7 us for each parameter
        self._bare.clear()


class _Calls:
    """A forward pre-hook that calls a function."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def __call__(self, module: torch.nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and module.training and torch.is_grad_enabled():
            self._function()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Unwatched, ()


class _Unwatched:
    """What a copy of a watched module has instead."""

    def __call__(self, *args: Any) -> None:
        pass


def _first_with_gradient(output: Any) -> torch.Tensor | None:
    if isinstance(output, torch.Tensor):
        return output if output.requires_grad else None
    from torch.utils import _pytree

    for leaf in _pytree.tree_leaves(output):
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            return leaf
    return None
