"""The launcher's own error file: a scheduler that set `TORCHELASTIC_ERROR_FILE` for the launcher finds there what the
first failed worker recorded, with the exit code that the worker could not know."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from .failures import NOT_AVAILABLE, ProcessFailure


def publish(failure: ProcessFailure, path: Path) -> None:
    """Copies the failure's error file to `path`; nothing if it has none. Raises OSError if that cannot be written."""
    if failure.error_file == NOT_AVAILABLE:
        return
    data = copy.deepcopy(failure.error_file_data)
    if isinstance(data.get("message"), dict):
        data["message"]["errorCode"] = failure.exitcode
    path.write_text(json.dumps(data))
