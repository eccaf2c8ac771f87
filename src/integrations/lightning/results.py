"""What `self.log` has gathered in an epoch, as plain values, and made again from them.

Lightning gives no state of it (its own checkpoints are made where there is none), so this reads and writes the classes
of `trainer.connectors.logger_connector.result`. The values are this rank's own.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

_META = (
    "fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx", "dataloader_idx",
    "metric_attribute",
)  # fmt: skip
_VALUES = ("value", "cumulated_batch_size", "_forward_cache", "_computed", "has_reset", "_update_count")


def read_results(results: Any) -> list[dict[str, Any]]:
    """In the order in which they were logged first."""
    return [_read(key, metric) for key, metric in results.items()]


def _read(key: str, metric: Any) -> dict[str, Any]:
    meta = metric.meta
    found = {name: getattr(meta, name) for name in _META}
    found |= {"key": key, "reduce": meta.reduce_fx.__name__, "sync": meta.sync.should, "op": meta.sync.op}
    found |= {"rank_zero_only": meta.sync.rank_zero_only, "is_tensor": metric.is_tensor}
    for name in _VALUES:
        if hasattr(metric, name) and (metric.is_tensor or name in ("has_reset", "_update_count")):
            value = getattr(metric, name)
            found[name] = value.detach() if isinstance(value, torch.Tensor) else value
    return found


def write_results(results: Any, state: list[dict[str, Any]], trainer: Any) -> None:
    """Brings `results` to that state."""
    made = importlib.import_module(type(results).__module__)
    results.clear()
    metrics = dict(trainer.lightning_module.named_modules())
    for found in state:
        reduce_fx = getattr(torch, found["reduce"])
        meta = made._Metadata(**{name: found[name] for name in _META}, reduce_fx=reduce_fx)
        meta.sync = made._Sync(
            _should=found["sync"], fn=trainer.strategy.reduce, _op=found["op"], rank_zero_only=found["rank_zero_only"]
        )
        metric = made._ResultMetric(meta, found["is_tensor"])
        for name in _VALUES:
            if name in found:
                value = found[name]
                setattr(metric, name, value.clone() if isinstance(value, torch.Tensor) else value)
        if not found["is_tensor"]:
            metric.value = metrics.get(found["metric_attribute"])
        results[found["key"]] = metric


def read_metrics(module: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """By name: the state of every torchmetrics object in the module, which is in no `state_dict`."""
    return {
        name: {
            "count": metric._update_count,
            "computed": metric._computed if isinstance(metric._computed, torch.Tensor) else None,
            "values": {key: getattr(metric, key) for key in metric._defaults},
        }
        for name, metric in module.named_modules()
        if hasattr(metric, "_defaults") and hasattr(metric, "_update_count")
    }


def write_metrics(module: torch.nn.Module, state: dict[str, dict[str, Any]]) -> None:
    """Brings them to that state."""
    modules = dict(module.named_modules())
    for name, found in state.items():
        metric: Any = modules[name]
        for key, value in found["values"].items():
            copied = [item.clone() for item in value] if isinstance(value, list) else value.clone()
            setattr(metric, key, copied)
        metric._update_count, metric._computed = found["count"], found["computed"]
