"""What is registered, sorted by how it is carried, and proven to be: large tensors, small state, parts that move.

What is true of an object's state is what its own `state_dict()` gives. Everything in there must be among what is
carried, or `register` refuses the object, with its name and what to do instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ...protocol.deepspeed import is_of_deepspeed, sentence
from ...protocol.values import EncodingError, encode
from ..errors import UnsupportedStateError
from . import optimizers as optim
from .provider import CombinedState, StateProvider, complete
from .small import SmallStateTaker
from .stateful import is_generator, is_scaler, read_object
from .tensors import TorchState, local
from .tree import tensors_in

SCHEDULERS = (torch.optim.lr_scheduler.LRScheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


class Registry:
    """The objects of one registration.

    Modules and optimizers make a `TorchState`, beside which there may be other providers of state; optimizers'
    hyperparameters, schedulers and the gradient scaler are small state of the shared part; generators and anything else
    with `state_dict` of the local part.
    """

    def __init__(self, objects: dict[str, Any]) -> None:
        self.objects = dict(objects)
        self.modules = {name: o for name, o in objects.items() if isinstance(o, torch.nn.Module)}
        self.optimizers = {name: o for name, o in objects.items() if isinstance(o, torch.optim.Optimizer)}
        self.movers = {name: o for name, o in objects.items() if isinstance(o, SCHEDULERS) or is_scaler(o)}
        self.providers = {name: complete(o) for name, o in objects.items() if isinstance(o, StateProvider)}
        carried = {*self.modules, *self.optimizers, *self.movers, *self.providers}
        rest = {name: o for name, o in objects.items() if name not in carried}
        for name, target in objects.items():
            _refuse_deepspeed(name, target)
        for name, module in self.modules.items():
            _refuse_module(name, module)
        self.torch_state = TorchState(self.modules, self.optimizers)
        self.state = CombinedState(self.torch_state, self.providers)
        self.taker = SmallStateTaker()
        self.taker.extras = self.torch_state.extra_states()
        self.taker.set_buffers(self.torch_state.buffer_places())
        self.taker.local = {**rest, **self._rank_states()}
        self.taker.shared = {**self.torch_state.optimizers, **self.movers}
        self._rewritten: set[str] = set()
        """Modules whose `state_dict()` has a parameter under other names."""
        self.dropped = False
        """The tensors have been let go (`drop_tensors`)."""
        self.prove()

    def structure(self) -> tuple[Any, ...]:
        """What tells one shape of the registered objects from another: equal as long as nothing was added or bound to
        another place. Asked for when they are registered again."""
        groups = [
            [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
            for optimizer in self.torch_state.optimizers.values()
        ]
        self.torch_state.look_again()
        return list(self.torch_state.parameters()), list(self.torch_state.buffer_places()), groups

    def drop_tensors(self) -> None:
        """Lets go of everything large: the state has been copied elsewhere and other objects will take over."""
        self.dropped = True
        self.state.drop()

    def owner(self, tensor: str) -> str:
        """The name under which the object was registered that has this tensor."""
        head = tensor.partition("::")[0] if "::" in tensor else tensor
        names = [name for name in self.objects if head == name or head.startswith((f"{name}.", f"{name}/"))]
        return max(names, key=len, default=head)

    # ---- proof -----------------------------------------------------------------------------------------------------

    def prove(self) -> None:
        """Raises UnsupportedStateError where something of a registered object would not be carried. Again after the
        first update: optimizers have no state before."""
        for name, target in self.objects.items():
            if name not in self.modules and name not in self.optimizers and name not in self.providers:
                _check_stateful(name, target)
        tensors = self.torch_state.named_tensors()
        carried = {value.untyped_storage().data_ptr() for value in tensors.values() if value.nbytes}
        carried |= {value.untyped_storage().data_ptr() for value in self.taker.buffers().values() if value.nbytes}
        names = {name.removesuffix(".extra_state") for name in self.taker.extras}
        for name, module in self.torch_state.modules.items():
            self._prove_module(name, module, carried, names)
        for name, value in tensors.items():
            _refuse_tensor(self.owner(name), name, value)
        for name, optimizer in self.torch_state.optimizers.items():
            optim.check_keys(name, optimizer)
        for name, optimizer in self.optimizers.items():
            _prove_optimizer(name, optimizer, carried)
        self._encode_once()

    def _prove_module(self, name: str, module: torch.nn.Module, carried: set[int], extras: set[str]) -> None:
        if name in self._rewritten:  # asking again could be a collective, and not all ranks may be there
            return
        known = {*self.torch_state.parameters(), *self.torch_state.buffer_places()}
        unknown = {}
        told = module.state_dict()
        for key, value in told.items():
            path, _, last = key.rpartition(".")
            if last == "_extra_state" and ".".join(filter(None, (name, path))) in extras:
                continue
            is_tensor = isinstance(value, torch.Tensor)
            if is_tensor and (f"{name}.{key}" in known or not value.numel() or _storage(value) in carried):
                continue
            unknown[key] = value
        if unknown:
            self._rewritten.add(name)
        for key in unknown.keys() - _rewritten(module, told, unknown):
            raise UnsupportedStateError(
                f"register({name}=...): '{key}' in the module's state_dict() is neither a parameter nor a buffer; make "
                "it one (register_buffer), or give it by get_extra_state() and set_extra_state()"
            )

    def _encode_once(self) -> None:
        """Finds out now, with the object's name, what could not be sent in the middle of a recovery."""
        for name, values in self.torch_state.host_state().items():
            _encode(name.partition(".")[0], values, "keep tensors and plain values in the optimizer's state")
        for name, module in self.taker.extras.items():
            _encode(name, module.get_extra_state(), "let get_extra_state() give plain values and tensors")
        for name, optimizer in self.torch_state.optimizers.items():
            _encode(name, read_object(optimizer), "keep plain values and tensors in its parameter groups")
        for name, provider in self.providers.items():
            _encode(name, provider.host_state(), "let host_state() give plain values and tensors")
            _encode(name, provider.rank_state(), "let rank_state() give plain values and tensors")

    def _rank_states(self) -> dict[str, Any]:
        return {
            f"{name}'s rank": _RankState(provider)
            for name, provider in self.providers.items()
            if type(provider).rank_state is not StateProvider.rank_state
        }


class _RankState:
    """A provider's own part of each rank, as an object with a state_dict."""

    def __init__(self, provider: StateProvider) -> None:
        self._provider = provider

    def state_dict(self) -> dict[str, Any]:
        return self._provider.rank_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._provider.load_rank_state(state)


def _rewritten(module: torch.nn.Module, told: dict[str, Any], unknown: dict[str, Any]) -> set[str]:
    """Entries that a submodule's hook has made of its parameters, such as the three parts of a fused projection: as
    many elements have come as parameters are missing there."""
    if not unknown:
        return set()
    there = {_storage(value) for value in told.values() if isinstance(value, torch.Tensor)}
    missing = {_plain(key): value for key, value in module.named_parameters() if _storage(value) not in there}
    found: set[str] = set()
    for path, submodule in module.named_modules():
        if not submodule._state_dict_hooks:
            continue
        inside = f"{_plain(path)}." if path else ""
        made = {key: value for key, value in unknown.items() if key.startswith(inside)}
        of = [value for key, value in missing.items() if key.startswith(inside)]
        if of and _elements(made.values()) == _elements(of):
            found |= made.keys()
    return found


def _plain(path: str) -> str:
    """Without the wrappers of activation checkpointing and torch.compile, which leave no trace in a `state_dict`."""
    return ".".join(part for part in path.split(".") if part not in ("_checkpoint_wrapped_module", "_orig_mod"))


def _elements(values: Iterable[Any]) -> Counter[torch.dtype]:
    counted: Counter[torch.dtype] = Counter()
    for value in values:
        if not isinstance(value, torch.Tensor):
            return Counter()
        counted[value.dtype] += value.numel()
    return counted


def _refuse_deepspeed(name: str, target: Any) -> None:
    """An engine, also where it is a part of a module, and its optimizers, which are no optimizers of torch's."""
    parts = target.modules() if isinstance(target, torch.nn.Module) else [target]
    for part in parts:
        if is_of_deepspeed(part):
            raise UnsupportedStateError(sentence(f"register({name}=...): a {type(part).__name__} belongs to"))


def _refuse_module(name: str, module: torch.nn.Module) -> None:
    """What is known not to come out right."""
    for path, submodule in module.named_modules():
        place = f"register({name}=...): '{path}'" if path else f"register({name}=...): it"
        if type(submodule).__name__ == "FullyShardedDataParallel":
            raise UnsupportedStateError(
                f"{place} is wrapped in FullyShardedDataParallel (FSDP1), which keeps another part of a parameter on "
                "each rank under one name; shard the model with torch.distributed.fsdp.fully_shard (FSDP2) instead"
            )
    for key, value in [*module.named_parameters(), *module.named_buffers()]:
        if torch.nn.parameter.is_lazy(value):
            raise UnsupportedStateError(
                f"register({name}=...): '{key}' has no shape yet (a lazy module); run a batch through the module first"
            )
        _refuse_tensor(name, key, value)


def _refuse_tensor(name: str, key: str, value: torch.Tensor) -> None:
    """Raises UnsupportedStateError for a tensor whose memory is not its elements."""
    if value.layout is not torch.strided or value.is_quantized:
        kind = "quantized" if value.is_quantized else str(value.layout).removeprefix("torch.")
    elif value.is_meta:
        kind = "without memory (on the meta device)"
    elif not hasattr(value, "device_mesh") and _is_wrapper(value):
        kind = f"a {type(value).__name__}"
    else:
        return
    raise UnsupportedStateError(
        f"register({name}=...): the tensor '{key}' is {kind}; only dense tensors are carried: register a StateProvider "
        "that gives its parts as dense ones"
    )


def _is_wrapper(value: torch.Tensor) -> bool:
    """Whether it is a subclass that holds other tensors (weights quantized by torchao and the like)."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return type(value) not in _PLAIN_TENSORS and is_traceable_wrapper_subclass(value)


def _prove_optimizer(name: str, optimizer: torch.optim.Optimizer, carried: set[int]) -> None:
    """All tensors of its own `state_dict()` must be those that are carried, or equal to nothing that is trained."""
    if type(optimizer).__name__ == "ZeroRedundancyOptimizer":  # gives nothing before it has been consolidated
        return
    told = optimizer.state_dict()
    extras = optim.extras_of(optimizer)
    for key in told.keys() - extras.keys():
        for path, tensor in tensors_in(told[key], str(key)):
            if tensor.numel() > 1 and _storage(tensor) not in carried:
                raise UnsupportedStateError(
                    f"register({name}=...): '{path}' in the optimizer's state_dict() is not kept in the state of an "
                    f"optimizer that could be found in this {type(optimizer).__name__}; register those that hold it"
                )
    _encode(name, extras, "let its state_dict() give plain values and tensors")


def _storage(value: torch.Tensor) -> int:
    return local(value).untyped_storage().data_ptr()


def _check_stateful(name: str, target: Any) -> None:
    """Early, and with the object's name, instead of in the middle of a recovery."""
    if not is_generator(target) and not (hasattr(target, "state_dict") and hasattr(target, "load_state_dict")):
        raise UnsupportedStateError(
            f"register({name}=...): a {type(target).__name__} has no state_dict and load_state_dict; "
            "wrap it in an object that has"
        )
    _encode(name, read_object(target), "let its state_dict give plain values and tensors")


def _encode(name: str, value: Any, remedy: str) -> None:
    try:
        encode(value)
    except EncodingError as error:
        raise UnsupportedStateError(f"register({name}=...): {error}; {remedy}") from None


def names_of_movers(registry: Registry) -> Iterator[str]:
    """What an update moves, as `step.watch` tells of it."""
    yield from registry.torch_state.optimizers
    yield from registry.movers
