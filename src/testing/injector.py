"""Where in a step the faults of HYPERPODRUN_INJECT fire: hooks on what is registered.

| place | when |
|---|---|
| `forward` | a registered module's forward pass begins |
| `backward` | the first gradient of a registered module arrives: before DDP sends it |
| `before-update` | an optimizer is about to step; nothing has changed, and no lock is held |
| `in-update` | an optimizer has changed its parameters; the step is not complete |
| `after-update` | the last of what moves in an update has moved, and the step counts; or else the pass ends |

torch.compile must not see these hooks: in a graph they would break it, or make other kernels of it, and other
roundings. A compiled module has no `forward` therefore; what was asked for there fires with the first gradient.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.optim import optimizer as torch_optimizer

from .faults import fire
from .grammar import Injection, numbered
from .settings import trace_directory
from .trace import write_line

_SCHEDULERS = (torch.optim.lr_scheduler.LRScheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)


class Injector:
    """Fires what is due on this rank. Hooked in also without faults, so that traced runs are alike in that."""

    def __init__(self, manager: Any, injections: list[Injection]) -> None:
        self._manager = manager
        self._events = numbered(injections)
        self._objects: dict[str, Any] | None = None
        self._handles: list[Any] = []
        self._inside = False
        """A pass is under way."""
        self.places: list[str] = []
        """Those that this pass has come to, in order."""

    def begin(self) -> None:
        """A pass begins."""
        self.places = []
        objects = self._manager._registry.objects
        if self._objects is not objects:
            self._objects = objects
            self._attach(objects)
        self._inside = True

    def end(self) -> None:
        """A pass ends; its update, if it lasts until here, is not complete."""
        self.reach("after-update")
        self._inside = False

    def reach(self, place: str) -> None:
        """This rank is at that place of the step: fires what is due there."""
        if not self._inside or place in self.places:
            return
        if place == "backward":
            self.reach("forward")
        self.places.append(place)
        rank, epoch = self._manager._caller.rank, self._epoch()
        here = (rank, self._manager._tracker.index, place)
        for event, injection in self._events:
            if here == (injection.rank, injection.step, injection.where) and event == epoch:
                self._inside = False
                directory = trace_directory()
                if directory is not None:
                    write_line(directory, rank, {"fired": str(injection)})
                fire(injection)

    def _epoch(self) -> int:
        """Where functions are not re-entered, the starts of all processes are epochs."""
        starts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        return max(getattr(self._manager._caller, "epoch", 0), starts)

    def _attach(self, objects: dict[str, Any]) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for target in objects.values():
            if isinstance(target, torch.nn.Module):
                self._attach_module(target)
            elif isinstance(target, _SCHEDULERS):
                self._follow(target, "step")
            elif isinstance(target, torch.amp.GradScaler) or type(target).__name__ == "ShardedGradScaler":
                self._follow(target, "update")
        optimizers = [target for target in objects.values() if isinstance(target, torch.optim.Optimizer)]
        if optimizers:
            self._attach_optimizers(optimizers)

    def _attach_module(self, module: torch.nn.Module) -> None:
        self._handles.append(module.register_forward_pre_hook(lambda *_: self._forward()))
        self._handles.append(module.register_forward_hook(lambda *args: self._watch_output(args[-1])))
        for parameter in module.parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(lambda _: self.reach("backward")))

    def _forward(self) -> None:
        if not torch.compiler.is_compiling():
            self.reach("forward")

    def _watch_output(self, output: Any) -> None:
        """FSDP2 gives parameters their gradients by hand; those of the module's output are seen."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if not isinstance(output, torch.Tensor):
            from torch.utils import _pytree

            leaves = [leaf for leaf in _pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
            output = next((leaf for leaf in leaves if leaf.requires_grad), None)
        if output is not None and output.requires_grad:
            output.register_hook(lambda _: self.reach("backward"))

    def _attach_optimizers(self, optimizers: list[torch.optim.Optimizer]) -> None:
        def of_ours(place: str) -> Any:
            def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
                if any(optimizer is ours for ours in optimizers):
                    self.reach_after() if place == "after-update" else self.reach(place)

            return torch.compiler.disable(hook)

        before = torch_optimizer.register_optimizer_step_pre_hook(of_ours("before-update"))
        # Before the hook with which HPWrapper begins a critical section.
        torch_optimizer._global_optimizer_pre_hooks.move_to_end(before.id, last=False)  # type: ignore[attr-defined]
        after = torch_optimizer.register_optimizer_step_post_hook(of_ours("after-update"))
        self._handles += [before, after]
        for optimizer in optimizers:
            inside = optimizer.register_step_post_hook(of_ours("in-update"))
            # Before the hook that takes the step for complete.
            optimizer._optimizer_step_post_hooks.move_to_end(inside.id, last=False)  # type: ignore[attr-defined]
            self._handles.append(inside)

    def reach_after(self) -> None:
        """Something has moved. After the last of all that moves the manager's point is the next pass."""
        tracker = self._manager._tracker
        if tracker.point > tracker.index:
            self.reach("after-update")

    def _follow(self, target: Any, method: str) -> None:
        """By a class of its own for this object, as the registry does: an attribute would get into its state."""
        original = type(target)
        inner = getattr(original, method)

        def followed(this: Any, *args: Any, **kwargs: Any) -> Any:
            value = inner(this, *args, **kwargs)
            self.reach_after()
            return value

        names = {"__module__": original.__module__, "__qualname__": original.__qualname__, method: followed}
        target.__class__ = type(original.__name__, (original,), names)
