"""What the frames of the documentation's snippets import: a fault in the middle of a step, and what a rank ends with.

The test lays this file beside the script that it makes of a frame and a snippet. DOC_FAULTS names the faults, `raise`
or `kill`: fault n comes in epoch n, on ranks 1, 0, 1, ... in turn, in the backward pass of the fourth step of that
epoch. So none comes twice, whichever process is asked, and a frame of 12 steps or more meets all of "raise,kill".
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy
import torch
from hyperpodrun import CheckpointManager
from torch.utils._pytree import tree_leaves

STEP = 4
_faults = [kind for kind in os.environ.get("DOC_FAULTS", "").split(",") if kind]
_reached = {"epoch": -1, "step": 0}
_registered: dict[str, Any] = {}
_at_first: dict[str, str] = {}

torch.set_num_threads(1)  # a sum that is split over threads rounds differently
torch.manual_seed(0)
random.seed(0)
numpy.random.seed(0)


def faulty(model: torch.nn.Module) -> torch.nn.Module:
    """The same model, whose backward pass meets the faults: its peers are in theirs and wait for its gradients."""

    def called(module: torch.nn.Module, _: Any, output: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        if module.training and tensors:
            tensors[0].register_hook(lambda _: reach())

    model.register_forward_hook(called)
    return model


def reach() -> None:
    """A step is in its middle. Called by `faulty` models; a frame without one calls it itself."""
    epoch = int(os.environ.get("JOB_RESTART_COUNT", "0"))
    if epoch != _reached["epoch"]:
        _reached.update(epoch=epoch, step=0)
    _reached["step"] += 1
    due = epoch < len(_faults) and _reached["step"] == STEP and int(os.environ["RANK"]) == (epoch + 1) % 2
    if due and _faults[epoch] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if due:
        raise RuntimeError("a fault in the middle of a step")


def finish(**more: Any) -> None:
    """Training is over: writes a digest of everything that was registered, of the global generators, and of `more`."""
    states = {name: digest(value) for name, value in {**_registered, **more}.items()}
    assert _registered, "nothing was registered"
    assert any(states[name] != _at_first[name] for name in _registered), "nothing of what was registered has changed"
    states["generators"] = digest([torch.get_rng_state(), random.getstate(), numpy.random.get_state()])
    (Path(os.environ["DOC_OUT"]) / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(states))


def digest(value: Any) -> str:
    """Of its contents, whatever the order in which a peer has named them."""
    found = hashlib.sha256()
    _add(found, value)
    return found.hexdigest()


def _add(found: hashlib._Hash, value: Any) -> None:
    found.update(type(value).__name__.encode())
    if isinstance(value, torch.nn.Module):
        _add(found, {**dict(value.named_parameters()), **dict(value.named_buffers())})
    elif isinstance(value, torch.Tensor):
        value = value.to_local() if hasattr(value, "to_local") else value
        found.update(f"{value.dtype}{list(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, torch.Generator):
        _add(found, value.get_state())
    elif isinstance(value, random.Random):
        _add(found, value.getstate())
    elif isinstance(value, numpy.random.Generator):
        _add(found, value.bit_generator.state)
    elif hasattr(value, "state_dict"):
        _add(found, value.state_dict())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            found.update(repr(key).encode())
            _add(found, value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            _add(found, item)
    elif isinstance(value, numpy.ndarray | numpy.generic):
        found.update(value.tobytes())
    elif value is None or isinstance(value, bool | int | float | str | bytes):
        found.update(repr(value).encode())
    else:
        raise TypeError(f"a digest of {type(value).__name__}? Give finish() what the training ends with as data")


def _remember(register: Any) -> Any:
    @functools.wraps(register)
    def remembering(manager: CheckpointManager, **objects: Any) -> None:
        register(manager, **objects)
        _registered.update(objects)
        for name, value in objects.items():
            _at_first.setdefault(name, digest(value))

    return remembering


CheckpointManager.register = _remember(CheckpointManager.register)  # type: ignore[method-assign]
