"""What a rank's state was after each step, as digests: one JSON line per pass in `<directory>/rank-<R>.jsonl`.

A line is `{"step": S, "epoch": E, "digests": {name: digest}, "places": [...]}`. A step that is repeated after a fault
writes its line again, in the same file, also when another process has the rank by then; the later line counts. A rank
that was cut off after the update of a step has no line for it, if the update counts. Beside these there are lines of
what a script declared (`result`), of faults that fired (`fired`), and of findings (`unregistered`).

Nothing is changed by looking: no random number is drawn and no tensor written.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch

from .digests import digests, of_tensor


def write_line(directory: Path, rank: int, row: dict[str, Any]) -> None:
    """By one call of the system: a process that dies on the way leaves the whole line or none."""
    directory.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    fd = os.open(directory / f"rank-{rank}.jsonl", flags, 0o600)
    try:
        os.write(fd, json.dumps(row).encode() + b"\n")
    finally:
        os.close(fd)


def of_objects(objects: dict[str, Any]) -> dict[str, str]:
    """By name: the digests of everything registered, and of the global generators."""
    found: dict[str, str] = {}
    for name, target in objects.items():
        found |= _of_module(name, target) if isinstance(target, torch.nn.Module) else digests(name, _state(target))
    return found | _of_generators()


def _of_module(name: str, module: torch.nn.Module) -> dict[str, str]:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    found = {f"{name}.{path}": of_tensor(tensor) for path, tensor in tensors}
    for path, part in module.named_modules():
        if type(part).get_extra_state is not torch.nn.Module.get_extra_state:
            found |= digests(".".join(filter(None, (name, path, "extra_state"))), part.get_extra_state())
    return found


def _state(target: Any) -> Any:
    if isinstance(target, torch.optim.Optimizer):
        inner = getattr(target, "optim", None)  # ZeroRedundancyOptimizer: its own state_dict needs a collective
        return (inner if isinstance(inner, torch.optim.Optimizer) else target).state_dict()
    if hasattr(target, "state_dict"):
        return target.state_dict()
    if isinstance(target, torch.Generator):
        return target.get_state()
    if isinstance(target, random.Random):
        return target.getstate()
    if hasattr(target, "bit_generator"):
        return target.bit_generator.state
    named = getattr(target, "named_tensors", None)  # a StateProvider
    return dict(named()) if named is not None else None


def _of_generators() -> dict[str, str]:
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        states["numpy"] = numpy.random.get_state(legacy=False)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    found: dict[str, str] = {}
    for name, state in states.items():
        # One digest each: which word of a generator differs tells nobody anything.
        found[f"generator.{name}"] = _whole(digests(name, state))
    return found


def _whole(found: dict[str, str]) -> str:
    import xxhash

    return xxhash.xxh3_64_hexdigest(repr(sorted(found.items())).encode())
