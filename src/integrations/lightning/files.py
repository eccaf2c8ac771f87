"""Files of checkpoints over a restart: one that only the interrupted attempt has written is written again, by its name.

ModelCheckpoint counts a version up where a file has its name already. Of files that are newer than the job, those that
the position does not know as saved are of an attempt that was left.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

_KNOWN = 64
"""The last so many saved files are remembered."""


class Files:
    """What the trainer has saved and not removed."""

    def __init__(self) -> None:
        self._saved: list[str] = []
        self.began = 0.0
        """When the job did, by the clock of the rank that saves."""

    def saved(self, path: Any) -> None:
        self.removed(path)
        self._saved = [*self._saved, _name(path)][-_KNOWN:]

    def removed(self, path: Any) -> None:
        self._saved = [name for name in self._saved if name != _name(path)]

    def read(self) -> list[str]:
        return list(self._saved)

    def write(self, state: list[str]) -> None:
        self._saved = list(state)

    def is_left_over(self, path: Any) -> bool:
        """Whether the file is an interrupted attempt's."""
        try:
            return _name(path) not in self._saved and os.stat(path).st_mtime >= self.began
        except OSError:
            return False

    def watch(self, callback: Any, trainer: Any) -> None:
        """This ModelCheckpoint writes over what is left over."""
        exists = callback.file_exists

        def file_exists(filepath: Any, trainer: Any) -> bool:
            there = bool(exists(filepath, trainer))
            over = trainer.is_global_zero and self.is_left_over(filepath)
            return there and not trainer.strategy.reduce_boolean_decision(over, all=False)

        callback.file_exists = file_exists


def _name(path: Any) -> str:
    """With its directory's, which tells the files of two callbacks apart; wherever the job runs."""
    return "/".join(Path(str(path)).parts[-2:])
