"""DeepSpeed is refused: its engine cannot be entered again, and what it trains is in none of torch's objects."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

_RUNTIME = "deepspeed.runtime."
_PLAIN = ("deepspeed.runtime.lr_schedulers",)
"""What of it works without an engine."""


class DeepSpeedInUse(TypeError):
    """One sentence that says what to do instead. It ends the job at once: no restart would change it."""

    ends_job = True


def sentence(what: str) -> str:
    """`what` is DeepSpeed's, as the beginning of a sentence."""
    return (
        f"{what} DeepSpeed, which keeps the weights it trains and its process groups to itself and cannot go on in "
        "process after a fault; train with FSDP2 (torch.distributed.fsdp.fully_shard), or take HPWrapper away and let "
        "--max-restarts begin again from DeepSpeed's own checkpoints"
    )


def is_of_deepspeed(target: Any) -> bool:
    """Whether it is an engine, an optimizer or another part of DeepSpeed's runtime, or of a class made of one."""
    modules = [kind.__module__ or "" for kind in type(target).__mro__]
    return any(module.startswith(_RUNTIME) and not module.startswith(_PLAIN) for module in modules)


def refuse_in_use() -> None:
    """Called when an optimizer is about to step, before anything has changed. Raises DeepSpeedInUse where it is an
    engine of DeepSpeed's that has it step. Costs nothing where DeepSpeed is not imported."""
    if "deepspeed" not in sys.modules:
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.startswith(_RUNTIME) and not name.startswith(_PLAIN):
            raise DeepSpeedInUse(sentence("the function under HPWrapper trains with"))
        frame = frame.f_back
