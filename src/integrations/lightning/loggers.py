"""Loggers over a restart: the same version directory, and of a CSVLogger the same rows, each once.

A version is chosen when a logger is first used, which is before anything is restored; so the ranks agree on it at every
entry. A CSVLogger's file is put aside before the new logger finds, and deletes it; when the position is known, as many
rows as there were then come back.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

_ASIDE = ".interrupted"


def versions_of(trainer: Any) -> list[Any]:
    """The version of each logger that counts versions, None for others."""
    return [logger.version if hasattr(logger, "_get_next_version") else None for logger in trainer.loggers]


def set_versions(trainer: Any, versions: list[Any]) -> None:
    for logger, version in zip(trainer.loggers, versions, strict=True):
        if version is not None:
            logger._version = version


def put_aside(trainer: Any) -> None:
    """On the rank that logs, when it is entered again, before its loggers are used."""
    for logger in trainer.loggers:
        path = _file_of(logger)
        if path is not None and path.exists():
            os.replace(path, _aside(path))


def forget_aside(trainer: Any) -> None:
    """Training begins from the beginning: the rows of the attempt before it are not wanted."""
    for logger in trainer.loggers:
        path = _file_of(logger)
        if path is not None:
            _aside(path).unlink(missing_ok=True)


class Rows:
    """What one CSVLogger has written and what it still holds."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._path = _file_of(logger)
        self._writer = logger._experiment
        self._written = 0
        if self._writer is not None:
            self._save = self._writer.save
            self._writer.save = self._count

    def _count(self) -> None:
        self._written += len(self._writer.metrics)
        self._save()

    def read(self) -> dict[str, Any]:
        if self._writer is None:  # of another rank
            return {}
        keys = list(self._writer.metrics_keys)
        return {"written": self._written, "keys": keys, "held": [dict(row) for row in self._writer.metrics]}

    def write(self, state: dict[str, Any]) -> None:
        if self._writer is None or self._path is None or not state:
            return
        self._written = state["written"]
        self._writer.metrics_keys = list(state["keys"])
        self._writer.metrics = [dict(row) for row in state["held"]]
        if self._written and _aside(self._path).exists():
            _keep_rows(_aside(self._path), self._path, state["keys"], self._written)
        _aside(self._path).unlink(missing_ok=True)


def _keep_rows(source: Path, target: Path, keys: list[str], count: int) -> None:
    """The first `count` rows, with these columns."""
    with source.open(newline="") as file:
        rows = [row for _, row in zip(range(count), csv.DictReader(file), strict=False)]
    partial = target.with_name(f"{target.name}.partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=keys, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, target)


def rows_of(trainer: Any) -> list[Rows]:
    """Of the CSVLoggers, in their order."""
    return [Rows(logger) for logger in trainer.loggers if _file_of(logger) is not None]


def _file_of(logger: Any) -> Path | None:
    if not any(kind.__name__ == "CSVLogger" for kind in type(logger).__mro__):
        return None
    return Path(logger.log_dir) / "metrics.csv"


def _aside(path: Path) -> Path:
    return path.with_name(path.name + _ASIDE)
