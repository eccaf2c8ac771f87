"""The named tensors of modules and optimizers, for plain PyTorch, DDP, FSDP2 and ZeroRedundancyOptimizer.

Names come from the modules' own parameter names; optimizer state is found through the parameter it belongs to, or the
key it is kept under. Everything is bound to a place (a module and a name), not to the tensor that is there when it is
registered: `.to()`, `load_state_dict(assign=True)` and the like put others in their places. With sharded parameters
(DTensor) only this rank's local part is meant, everywhere.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from ...protocol.values import layout_of
from ..errors import RestoreError
from . import optimizers as optim
from .provider import Skeleton, StateProvider, TensorSpec, dtype_name, make_tensor, specify
from .replicas import group_of, shard_of
from .tree import rebuild, structure, tensors_in

_version = operator.attrgetter("_version")


class _Place(NamedTuple):
    """Where a parameter is. `sharded`: the parameter itself; while FSDP2 computes, the gathered one is in its place."""

    holder: Mapping[Any, Any] | list[Any]
    key: Any
    sharded: torch.Tensor | None

    @property
    def tensor(self) -> torch.Tensor | None:
        if self.sharded is not None:
            return self.sharded
        try:
            found: torch.Tensor | None = self.holder[self.key]
        except (KeyError, IndexError):
            return None
        return found


class TorchState(StateProvider):
    """Modules and optimizers as a `StateProvider`."""

    def __init__(self, modules: Mapping[str, torch.nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
        self.modules = {name: unwrap(module) for name, module in modules.items()}
        self.registered_optimizers = dict(optimizers)
        self.optimizers = {
            key: part for name, optimizer in optimizers.items() for key, part in optim.parts_of(name, optimizer).items()
        }
        self._places: dict[str, _Place] = {}
        self._live: tuple[torch.Tensor, ...] = ()
        self._wanted: dict[str, TensorSpec] = {}
        self.look_again()

    # ---- what there is ---------------------------------------------------------------------------------------------

    def look_again(self) -> None:
        """Finds the parameters anew: the modules' own, and those that only an optimizer knows."""
        places: dict[str, _Place] = {}
        seen: set[int] = set()
        for name, module in self.modules.items():
            for full, holder, key, value in _parameters(name, module):
                if id(value) not in seen:
                    seen.add(id(value))
                    before = self._places.get(full)
                    kept = before.sharded if before is not None else None
                    sharded = kept if kept is not None else value if hasattr(value, "device_mesh") else None
                    places[full] = _Place(holder, key, sharded)
        known = {id(place.tensor) for place in places.values()}
        for name, optimizer in self.optimizers.items():
            for number, group in enumerate(optimizer.param_groups):
                for index, value in enumerate(group["params"]):
                    if id(value) not in known:
                        known.add(id(value))
                        sharded = value if hasattr(value, "device_mesh") else None
                        places[f"{name}.{number}.{index}"] = _Place(group["params"], index, sharded)
        self._places = places
        self._live = tuple(self.parameters().values())

    def parameters(self) -> dict[str, torch.Tensor]:
        """By name, those that are there now. Raises RestoreError for one that is gone."""
        found: dict[str, torch.Tensor] = {}
        for name, place in self._places.items():
            value = place.tensor
            if value is None:
                raise RestoreError(
                    f"parameter {name} is not there any more: register its module again after the change"
                )
            found[name] = value
        return found

    def buffer_places(self) -> dict[str, tuple[dict[str, torch.Tensor | None], str]]:
        """By name, the module's dictionary in which each buffer is, and its key there."""
        places: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {}
        seen: set[int] = set()
        for name, module in self.modules.items():
            for path, submodule in module.named_modules():
                for key, value in submodule._buffers.items():
                    if value is not None and id(value) not in seen:
                        seen.add(id(value))
                        places[".".join(filter(None, (name, path, key)))] = (submodule._buffers, key)
        return places

    def extra_states(self) -> dict[str, torch.nn.Module]:
        """The modules that have `get_extra_state`, by the name of their state."""
        base = torch.nn.Module
        return {
            ".".join(filter(None, (name, path, "extra_state"))): submodule
            for name, module in self.modules.items()
            for path, submodule in module.named_modules()
            if type(submodule).get_extra_state is not base.get_extra_state
        }

    def shard(self) -> str:
        return shard_of(self.parameters(), self.registered_optimizers)

    def parts(self) -> dict[str, str]:
        """Where parameters of one model are spread over different dimensions (experts), each has its own replicas."""
        parameters = self.parameters()
        groups = {name: group_of(value) for name, value in parameters.items()}
        if len(set(groups.values())) < 2:
            return {}
        found = dict(groups)
        for name, parameter_name, _, value in self._state():
            if parameter_name is not None:
                found |= {path: groups[parameter_name] for path, _ in tensors_in(value, name)}
        return found

    def frozen(self) -> frozenset[str]:
        """Parameters that want no gradient, are of no optimizer, and have not been seen to change all the same."""
        owned = {id(p) for optimizer in self.optimizers.values() for g in optimizer.param_groups for p in g["params"]}
        return frozenset(
            name
            for name, value in self.parameters().items()
            if not value.requires_grad and id(value) not in owned and name not in self.moved
        )

    moved: frozenset[str] = frozenset()
    """The tensors that have been seen to change."""

    def named_tensors(self) -> dict[str, torch.Tensor]:
        self.look_again()
        tensors = {name: local(value) for name, value in self.parameters().items()}
        for name, _, _, value in self._state():
            for path, tensor in tensors_in(value, name):
                tensors[path] = local(tensor)
        return tensors

    def skeleton(self) -> list[TensorSpec]:
        return specify(self.named_tensors())

    def versions(self) -> int:
        """A number that changes with every change of a parameter in place."""
        return sum(map(_version, self._live))

    def host_state(self) -> dict[str, Any]:
        """By optimizer: the parameters of its groups, by name, and the structure of what it keeps."""
        self.look_again()
        names = {id(value): name for name, value in self.parameters().items()}
        return {
            name: {
                "groups": [[names[id(value)] for value in group["params"]] for group in optimizer.param_groups],
                "state": [
                    [of, None if of is not None else key, structure(value, path)]
                    for path, of, key, value in self._state_of(name, optimizer, names)
                ],
                "layouts": {
                    path: layout
                    for prefix, _, _, value in self._state_of(name, optimizer, names)
                    for path, tensor in tensors_in(value, prefix)
                    if (layout := layout_of(local(tensor)))
                },
            }
            for name, optimizer in self.optimizers.items()
        }

    # ---- making it what another rank has ---------------------------------------------------------------------------

    def materialise(self, skeleton: Skeleton) -> None:
        wanted = {spec[0]: spec for spec in skeleton}
        parameters = self.parameters()
        for name, value in parameters.items():
            if name not in wanted:
                raise RestoreError(
                    f"the source has no parameter {name}: it trains another model, or has changed this one (pruned it, "
                    "say) after register(); change a model before it is registered"
                )
            _, dtype, shape, _ = wanted[name]
            here = local(value)
            if (dtype, tuple(shape)) != (dtype_name(here), tuple(here.shape)):
                raise RestoreError(
                    f"parameter {name} is {dtype_name(here)} {list(here.shape)} here and {dtype} {list(shape)} on the "
                    "source: they are not replicas of each other"
                )
        self._wanted = {name: spec for name, spec in wanted.items() if name not in parameters}

    def load_host_state(self, state: Mapping[str, Any]) -> None:
        parameters = self.parameters()
        for name, optimizer in self.optimizers.items():
            told = state.get(name)
            if not isinstance(told, dict):
                raise RestoreError(f"the source has no optimizer {name}: it trains otherwise")
            self._match_groups(name, optimizer, told["groups"], parameters)
            names = {id(value): key for key, value in parameters.items()}
            present = {
                path: tensor
                for prefix, _, _, value in self._state_of(name, optimizer, names)
                for path, tensor in tensors_in(value, prefix)
            }
            made: dict[Any, Any] = {}
            for of, key, plain in told["state"]:
                parameter = parameters[of] if of is not None else None
                layouts = told["layouts"]

                def tensor(
                    path: str, sharded: bool, parameter: Any = parameter, present: Any = present, layouts: Any = layouts
                ) -> torch.Tensor:
                    return self._make(path, sharded, parameter, present.get(path), layouts.get(path, ()))

                made[parameter if parameter is not None else key] = rebuild(plain, tensor)
            for key in [key for key in optimizer.state if key not in made]:
                del optimizer.state[key]
            optimizer.state.update(made)

    def _match_groups(
        self, name: str, optimizer: torch.optim.Optimizer, wanted: list[list[str]], parameters: Mapping[str, Any]
    ) -> None:
        """Parameter groups that were added in training are added here, too; their values come with the small state."""
        unknown = [key for group in wanted for key in group if key not in parameters]
        if unknown:
            raise RestoreError(f"optimizer {name} of the source trains {unknown[0]}, which is not registered here")
        groups = optimizer.param_groups
        for group, keys in zip(groups, wanted, strict=False):
            if [id(value) for value in group["params"]] != [id(parameters[key]) for key in keys]:
                group["params"][:] = [parameters[key] for key in keys]
        del groups[len(wanted) :]
        for keys in wanted[len(groups) :]:
            optimizer.add_param_group({"params": [parameters[key] for key in keys]})

    def _make(
        self,
        path: str,
        sharded: bool,
        parameter: torch.Tensor | None,
        present: torch.Tensor | None,
        layout: tuple[int, ...],
    ) -> torch.Tensor:
        """One tensor of optimizer state, to be filled: the one that is there, if it is as the source's."""
        if path not in self._wanted:
            raise RestoreError(f"the source describes no tensor {path}")
        _, dtype, shape, device = self._wanted[path]
        kind = getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype):
            raise RestoreError(f"{path} is of an unknown dtype, {dtype!r}")
        if present is not None:
            here = local(present)
            if (here.dtype, tuple(here.shape), here.device.type) == (kind, tuple(shape), device) and (
                layout_of(here) == layout and _owns_its_memory(here)
            ):
                return present
        if sharded and parameter is not None:
            return torch.empty_like(parameter, dtype=kind, requires_grad=False)
        # The step counter is on the CPU with some optimizers, whatever the device of the parameter.
        own = local(parameter).device if parameter is not None else torch.device(device)
        return make_tensor(shape, kind, own if own.type == device else torch.device(device), layout)

    def reset(self) -> None:
        for parameter in self.parameters().values():
            parameter.grad = None

    def quiesce(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def drop(self) -> None:
        parameters = self.parameters()
        for optimizer in {*self.optimizers.values(), *self.registered_optimizers.values()}:
            optimizer.state.clear()
            for group in optimizer.param_groups:
                group["params"] = []
        for parameter in parameters.values():
            parameter.grad = None
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        self._places.clear()
        self._live = ()

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _state(self) -> Iterator[tuple[str, str | None, Any, Any]]:
        """(path, name of the parameter or None, key, value) of all that the optimizers keep."""
        names = {id(value): name for name, value in self.parameters().items()}
        for name, optimizer in self.optimizers.items():
            yield from self._state_of(name, optimizer, names)

    @staticmethod
    def _state_of(
        prefix: str, optimizer: torch.optim.Optimizer, names: Mapping[int, str]
    ) -> Iterator[tuple[str, str | None, Any, Any]]:
        """The same of one: state of parameters in the order of the groups, then what is kept under other keys."""
        state = optimizer.state
        done: set[int] = set()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in state and id(parameter) not in done:
                    done.add(id(parameter))
                    name = names[id(parameter)]
                    yield f"{prefix}/{name}", name, None, state[parameter]
        for key in sorted((key for key in state if not isinstance(key, torch.Tensor)), key=repr):
            yield f"{prefix}/[{key!r}]", None, key, state[key]


def _parameters(name: str, module: torch.nn.Module) -> Iterator[tuple[str, dict[str, Any], str, torch.Tensor]]:
    """(full name, the module's dictionary, key in it, parameter), without wrappers' parts in the names."""
    for path, submodule in module.named_modules():
        for key, value in submodule._parameters.items():
            if value is not None:
                yield ".".join(filter(None, (name, path, key))), submodule._parameters, key, value


def _owns_its_memory(tensor: torch.Tensor) -> bool:
    """Whether no two of its elements are one (as in what `expand` gives)."""
    return all(stride != 0 or size <= 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The user's own module inside DistributedDataParallel or torch.compile."""
    while True:
        if isinstance(module, torch.nn.parallel.DistributedDataParallel):
            module = module.module
        elif hasattr(module, "_orig_mod"):
            module = module.__dict__["_modules"]["_orig_mod"]
        else:
            return module


def local(value: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that is in this process, detached: a view of the same memory."""
    value = value.detach()
    to_local = getattr(value, "to_local", None)
    return to_local() if to_local is not None else value
