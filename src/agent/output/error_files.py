"""The launcher's own error file: a scheduler that set `TORCHELASTIC_ERROR_FILE` for the launcher finds there what the
first failed worker recorded, with the exit code that the worker could not know."""

from __future__ import annotations

import json
from pathlib import Path

from .failures import NOT_AVAILABLE, ProcessFailure


def publish(failure: ProcessFailure, path: Path) -> None:
    """Copies the failure's error file to `path`; nothing if it has none. Raises OSError if that cannot be written."""
    if failure.error_file == NOT_AVAILABLE:
        return
    data = dict(failure.error_file_data)
    if isinstance(data.get("message"), dict):
        data["message"] = {**data["message"], "errorCode": failure.exitcode}
    try:
        text = json.dumps(data)
    except RecursionError:  # it is the worker's; reading it has gone one level deeper than writing it does
        raise OSError(f"{failure.error_file} is nested too deeply") from None
    path.write_text(text)
