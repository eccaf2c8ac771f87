"""Turning option values into what they mean. Every error is one sentence, raised as click.BadParameter."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import click

from ..agent.config import OutputMap

MAX_LOCAL_RANKS = 4096
_AROUND = " \t\r\n'\""
_TORCH_LIMIT_S = 120.0
"""For a process that imports torch and asks it for devices."""


def count_processes(value: str) -> int:
    """`--nproc-per-node`: a number, `auto` (GPUs, or cores where there is none), `cpu`, `gpu` or `xpu`."""
    if value == "cpu":
        return _cpu_count()
    if value in ("gpu", "auto"):
        gpus = _gpu_count()
        if gpus:
            return gpus
        if value == "gpu":
            raise click.BadParameter("'gpu' was asked for, but NVML finds no GPU on this machine")
        return _cpu_count()
    if value == "xpu":
        xpus = _xpu_count()
        if not xpus:
            raise click.BadParameter("'xpu' was asked for, but torch finds no such device on this machine")
        return xpus
    count = _int(value)
    if count is None or not 1 <= count <= MAX_LOCAL_RANKS:
        raise click.BadParameter(f"{value!r} is neither a number from 1 to {MAX_LOCAL_RANKS} nor auto, cpu, gpu or xpu")
    return count


def parse_nnodes(value: str) -> tuple[int, int]:
    """`--nnodes`: N or MIN:MAX."""
    numbers = [_int(part) for part in value.split(":")]
    low, high = numbers[0], numbers[-1]
    if len(numbers) > 2 or low is None or high is None:
        raise click.BadParameter(f"{value!r} is neither N nor MIN:MAX")
    if not 0 < low <= high:
        raise click.BadParameter(f"{value!r} must be 0 < MIN <= MAX")
    return low, high


def parse_rendezvous_settings(value: str) -> dict[str, str]:
    """`--rdzv-conf`: KEY=VALUE,..., spaces and quotes around both ignored.

    Lists in YAML or Python pass quotes on that no shell takes away; torchrun then knows the setting by another name.
    """
    settings: dict[str, str] = {}
    plain = value.strip(_AROUND)
    for item in plain.split(",") if plain else ():
        key, _, setting = (part.strip(_AROUND) for part in item.partition("="))
        if not key or not setting:
            raise click.BadParameter(f"{value!r} is not KEY=VALUE,...")
        settings[key] = setting
    return settings


def parse_ranks(value: str) -> frozenset[int] | None:
    """`--local-ranks-filter`: numbers; None for all."""
    if not value:
        return None
    ranks = [_int(item) for item in value.split(",")]
    if None in ranks:
        raise click.BadParameter(f"{value!r} is not RANK,RANK,...")
    return frozenset(rank for rank in ranks if rank is not None)


def parse_texts(value: str) -> tuple[str, ...]:
    """`--duplicate-stdout-filters`: texts between commas, in which two commas are one."""
    return tuple(item.replace("\0", ",") for item in value.replace(",,", "\0").split(","))


def parse_signals(value: str) -> tuple[int, ...]:
    """`--signals-to-handle`: names. Not what cannot be caught, or is how the launcher hears of its children."""
    signals = tuple(parse_signal(name.strip()) for name in value.split(","))
    for signum in signals:
        if signum in (signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD):
            raise click.BadParameter(f"{signal.Signals(signum).name} cannot be passed on to workers")
    return signals


def parse_forwarded(value: str) -> tuple[int, ...]:
    """`--signals-to-forward`: names, or nothing."""
    return parse_signals(value) if value.strip() else ()


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


def _int(value: str) -> int | None:
    """What int() takes, as argparse and torchrun do: a sign, spaces around, underscores."""
    try:
        return int(value)
    except ValueError:
        return None


def _cpu_count() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _xpu_count() -> int:
    """Only torch can tell; it is asked in a process of its own."""
    program = "import torch; print(torch.xpu.device_count() if torch.xpu.is_available() else 0)"
    try:
        answer = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=_TORCH_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        raise click.BadParameter(f"'xpu': torch has not counted them within {_TORCH_LIMIT_S:g} s") from None
    return _int(answer.stdout) or 0


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
