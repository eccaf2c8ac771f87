"""examples/titan/train.py, which notes the losses that are in the metrics. `--skip-copy`: the negative control."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import train
from torchtitan.components.metrics import MetricsProcessor

log = MetricsProcessor.log


def noted(self: Any, step: int, global_avg_loss: float, *rest: Any, **more: Any) -> None:
    path = Path(os.environ["LOSSES"]) / f"losses-{os.environ['RANK']}.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({"step": step, "loss": float(global_avg_loss).hex()}) + "\n")
    log(self, step, global_avg_loss, *rest, **more)


def skip_copy() -> None:
    """What a lost rank receives does not get into its tensors."""
    from hyperpodrun.checkpointless.transfer import restore

    take = restore.Restorer._take

    def take_nothing(self: Any, transfer: Any, step: int) -> Any:
        before = {name: value.detach().clone() for name, value in self._registry.state.named_tensors().items()}
        small = take(self, transfer, step)
        with torch.no_grad():
            for name, value in self._registry.state.named_tensors().items():
                value.copy_(before[name]) if name in before else value.zero_()
        return small

    restore.Restorer._take = take_nothing  # type: ignore[method-assign]


if __name__ == "__main__":
    MetricsProcessor.log = noted
    if "--skip-copy" in sys.argv:
        sys.argv.remove("--skip-copy")
        skip_copy()
    train.run()
