"""Turning option values into what they mean. Every error is one sentence, raised as click.BadParameter."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Callable
from typing import Any

import click

from ..agent.config import OutputMap

MAX_LOCAL_RANKS = 4096


def count_processes(value: str) -> int:
    """`--nproc-per-node`: a number, `auto` (GPUs, or cores where there is none), `cpu` or `gpu`."""
    if value == "cpu":
        return _cpu_count()
    if value in ("gpu", "auto"):
        gpus = _gpu_count()
        if gpus:
            return gpus
        if value == "gpu":
            raise click.BadParameter("'gpu' was asked for, but NVML finds no GPU on this machine")
        return _cpu_count()
    count = int(value) if value.isascii() and value.isdecimal() else 0
    if not 1 <= count <= MAX_LOCAL_RANKS:
        raise click.BadParameter(f"{value!r} is neither a number from 1 to {MAX_LOCAL_RANKS} nor auto, cpu or gpu")
    return count


def parse_nnodes(value: str) -> tuple[int, int]:
    """`--nnodes`: N or MIN:MAX."""
    parts = value.split(":")
    if len(parts) > 2 or not all(part.isascii() and part.isdecimal() for part in parts):
        raise click.BadParameter(f"{value!r} is neither N nor MIN:MAX")
    low, high = int(parts[0]), int(parts[-1])
    if not 0 < low <= high:
        raise click.BadParameter(f"{value!r} must be 0 < MIN <= MAX")
    return low, high


def parse_outputs(value: str) -> OutputMap:
    """`--redirects`, `--tee`: 0 none, 1 stdout, 2 stderr, 3 both, for all local ranks, or `0:1,3:2` for some."""
    if value in ("0", "1", "2", "3"):
        return OutputMap(default=int(value))
    by_rank: dict[int, int] = {}
    for item in value.split(","):
        rank, separator, streams = item.partition(":")
        if not (separator and rank.isascii() and rank.isdecimal() and streams in ("0", "1", "2", "3")):
            raise click.BadParameter(f"{value!r} is neither 0, 1, 2 or 3 nor RANK:STREAMS,...")
        by_rank[int(rank)] = int(streams)
    return OutputMap(by_rank=by_rank)


def parse_modules(value: str) -> tuple[str, ...]:
    """`--preload`: names of modules, with commas between them."""
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise click.BadParameter(f"{name!r} is not the name of a module")
    return names


def parse_signal(value: str) -> int:
    """`--shutdown-signal`: a name, with or without SIG, or a number."""
    name = value.upper()
    try:
        if name.isdecimal():
            return signal.Signals(int(name))
        return signal.Signals[name if name.startswith("SIG") else f"SIG{name}"]
    except (KeyError, ValueError):
        raise click.BadParameter(f"{value!r} is not a signal") from None


def split_script(script: str | None, arguments: str | None) -> tuple[str, ...]:
    """`--pre-train-script` with its arguments, which are split as a shell would."""
    if not script:
        return ()
    if not os.path.isfile(script) or not os.access(script, os.X_OK):
        raise click.BadParameter(f"{script} is not an executable file")
    try:
        return (os.path.abspath(script), *shlex.split(arguments or ""))
    except ValueError as error:
        raise click.BadParameter(f"its arguments {arguments!r} cannot be split: {error}") from None


class Parsed(click.ParamType):  # type: ignore[type-arg]  # generic in click's stubs, not at run time
    """A click type made of one of the functions above."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except click.BadParameter as error:
            self.fail(error.message, param, ctx)


def _cpu_count() -> int:
    return os.cpu_count() or 1


def _gpu_count() -> int:
    """What CUDA would see: NVML's devices, or the choice of CUDA_VISIBLE_DEVICES. Never through torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        chosen = [item for item in visible.split(",") if item.strip()]
        valid = chosen[: chosen.index("-1")] if "-1" in chosen else chosen
        return min(len(valid), _nvml_count())
    return _nvml_count()


def _nvml_count() -> int:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0  # no driver, no GPU: that is an answer, not an error
    try:
        return int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()
