"""torchtitan's part, as far as it goes without the package: what is said where that is missing, and its metrics."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from hyperpodrun.integrations.torchtitan import recoverable
from hyperpodrun.integrations.torchtitan.metrics import Metrics


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchtitan", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hyperpodrun\[titan\]'"):
        recoverable(lambda: None)


class Logger:
    """As torchtitan's for TensorBoard. `told`: what it was told, by the folder it writes to."""

    told: dict[str, list[tuple[int, str]]]

    def __init__(self, folder: str) -> None:
        self.rows = Logger.told.setdefault(folder, [])
        self.writer = SimpleNamespace(flush=lambda: None, close=lambda: None, purge_step=None)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, next(iter(metrics))))

    def close(self) -> None:
        self.rows.append((-1, "closed"))


class MetricsProcessor:
    def __init__(self, config: SimpleNamespace) -> None:
        self.logger = self._build_metric_logger(config=config)

    def _build_metric_logger(self, *, config: SimpleNamespace) -> Logger:
        return Logger(module.datetime.now().strftime("%Y%m%d-%H%M%S"))


module = SimpleNamespace(MetricsProcessor=MetricsProcessor, datetime=None)
CONFIG = SimpleNamespace(enable_tensorboard=True, enable_wandb=False)


def entry(metrics: Metrics, steps: range, *, resumed: bool) -> Logger:
    """A trainer is built, trains these steps and is closed."""
    with metrics.kept():
        processor = MetricsProcessor(CONFIG)
        metrics.goes_on(steps.start - 1, resumed=resumed)
        for step in steps:
            processor.logger.log({"loss": 1.0}, step)
            if step % 2 == 0:
                processor.logger.log({"validation": 1.0}, step)
        processor.logger.close()
    assert metrics._logger is not None
    logger = metrics._logger._logger
    assert isinstance(logger, Logger)
    return logger


def test_a_repeated_step_is_logged_once_and_a_new_process_takes_over_from_there():
    Logger.told = {}
    lasting, new = Metrics(module), Metrics(module)
    new.began = lasting.began  # as all ranks agree
    entry(lasting, range(1, 4), resumed=False)
    entry(lasting, range(3, 5), resumed=True)
    lasting.close()
    assert entry(new, range(4, 6), resumed=True).writer.purge_step == 4
    once = [(1, "loss"), (2, "loss"), (2, "validation"), (3, "loss"), (4, "loss"), (4, "validation"), (-1, "closed")]
    assert list(Logger.told.values()) == [[*once, (4, "loss"), (4, "validation"), (5, "loss")]]
