"""What a Trainer keeps beside model, optimizer and scheduler, as plain values, and back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from transformers import Trainer
from transformers.trainer_callback import ExportableState

from ...checkpointless.errors import UnsupportedStateError
from ...protocol.values import EncodingError, encode
from ..accelerate.place import Values

_STATE = (
    "epoch",
    "global_step",
    "num_input_tokens_seen",
    "total_flos",
    "best_metric",
    "best_global_step",
    "best_model_checkpoint",
)
"""Of `TrainerState`: what changes in training and is the same on all ranks."""
_TRAINER = ("_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step", "_initial_num_input_tokens_seen")


class History:
    """The log of a run as text, entry by entry: each is encoded once."""

    def __init__(self) -> None:
        self._entries: list[str] = []

    def of(self, trainer: Trainer) -> list[str]:
        log = trainer.state.log_history
        self._entries = self._entries[: len(log)]
        self._entries += [json.dumps(entry, default=float) for entry in log[len(self._entries) :]]
        return list(self._entries)


def read_shared(trainer: Trainer, history: History) -> Values:
    """What is the same on all ranks."""
    values: Values = {name: getattr(trainer.state, name, None) for name in _STATE}
    values |= {name: getattr(trainer, name, None) for name in _TRAINER}
    values["control"] = dataclasses.asdict(trainer.control)
    values["history"] = history.of(trainer)
    values["exported"] = json.dumps(trainer.state.stateful_callbacks)
    values["callbacks"] = {name: _read_callback(name, callback) for name, callback in _callbacks(trainer).items()}
    return values


def write_shared(trainer: Trainer, values: Values) -> None:
    for name in _STATE:
        if values[name] is not None or hasattr(trainer.state, name):
            setattr(trainer.state, name, values[name])
    for name in _TRAINER:
        setattr(trainer, name, values[name])
    for name, value in values["control"].items():
        setattr(trainer.control, name, value)
    trainer.state.log_history = [json.loads(entry) for entry in values["history"]]
    trainer.state.stateful_callbacks = json.loads(values["exported"])
    callbacks = _callbacks(trainer)
    for name, state in values["callbacks"].items():
        if name in callbacks:
            _write_callback(callbacks[name], state)


def _callbacks(trainer: Trainer) -> dict[str, Any]:
    """Those that have a state, by their place and class."""
    return {
        f"{place} {type(callback).__name__}": callback
        for place, callback in enumerate(trainer.callback_handler.callbacks)
        if isinstance(callback, ExportableState) or _is_stateful(callback)
    }


def _is_stateful(callback: Any) -> bool:
    return hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict")


def _read_callback(name: str, callback: Any) -> Any:
    state = callback.state_dict() if _is_stateful(callback) else callback.state()["attributes"]
    try:
        encode(state)
    except EncodingError as error:
        raise UnsupportedStateError(
            f"the callback {name.partition(' ')[2]}: {error}; let its state be plain values and tensors"
        ) from None
    return state


def _write_callback(callback: Any, state: Any) -> None:
    if _is_stateful(callback):
        callback.load_state_dict(state)
        return
    for name, value in state.items():
        setattr(callback, name, value)
