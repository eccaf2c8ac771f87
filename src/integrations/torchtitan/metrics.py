"""torchtitan's loggers over restarts: one folder, and no step twice.

A logger is made when there is something to log, which is after the restore, and lives as long as the process. A process
that takes the place of another one writes to the same folder, named for the time at which the job's training began,
and says there that what is left of the steps it repeats is void.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any


class Metrics:
    """Those of this process. `began`: seconds since 1970; of all ranks the same."""

    def __init__(self, module: Any) -> None:
        self.began = int(time.time())
        self._module = module
        self._logger: _Kept | None = None

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """A MetricsProcessor that is built meanwhile gets the logger that there is."""
        processor = self._module.MetricsProcessor
        build = processor._build_metric_logger

        def given(this: Any, **settings: Any) -> Any:
            if not (settings["config"].enable_tensorboard or settings["config"].enable_wandb):
                return build(this, **settings)
            self._logger = self._logger or _Kept(lambda: self._make(build, this, settings))
            return self._logger

        processor._build_metric_logger = given
        try:
            yield
        finally:
            processor._build_metric_logger = build

    def goes_on(self, step: int, *, resumed: bool) -> None:
        """Training goes on behind `step`."""
        if self._logger is not None and resumed:
            self._logger.takes_over(step + 1)

    def close(self) -> None:
        """Training is over, without a fault."""
        if self._logger is not None:
            self._logger.end()
            self._logger = None

    def _make(self, build: Callable[..., Any], processor: Any, settings: dict[str, Any]) -> Any:
        began = datetime.datetime.fromtimestamp(self.began)
        before = self._module.datetime
        self._module.datetime = SimpleNamespace(now=lambda: began)
        try:
            return build(processor, **settings)
        finally:
            self._module.datetime = before


class _Kept:
    """A logger of torchtitan's that outlives the trainers of a process."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._logger: Any = None
        self._from: int | None = None
        self._last: dict[str, int] = {}

    def takes_over(self, step: int) -> None:
        if self._logger is None:
            self._from = step

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Once per step and kind, of which the first name tells: training and validation share the steps."""
        kind = next(iter(metrics), "")
        if step <= self._last.get(kind, -1):
            return
        self._last[kind] = step
        if self._logger is None:
            self._logger = self._make()
            self._void()
        self._logger.log(metrics, step)
        for writer in self._writers():
            writer.flush()  # or a killed process takes the last two minutes with it

    def close(self) -> None:
        """The trainer's end, which is not the process's."""

    def end(self) -> None:
        if self._logger is not None:
            self._logger.close()

    def _void(self) -> None:
        """TensorBoard leaves out what an earlier file of the folder has from that step on."""
        if self._from is None:
            return
        for writer in self._writers():
            writer.close()
            writer.purge_step = self._from

    def _writers(self) -> list[Any]:
        loggers = getattr(self._logger, "_loggers", [self._logger])
        return [logger.writer for logger in loggers if hasattr(logger, "writer")]
