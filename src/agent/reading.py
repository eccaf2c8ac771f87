"""Reading a file without changing anything: what is no regular file is left alone, as reading would consume it."""

from __future__ import annotations

import os
import stat

LARGEST = 64 << 20


def read_regular(path: str | os.PathLike[str], limit: int = LARGEST) -> bytes | None:
    """The beginning of a regular file; None for anything else: a pipe, a terminal, a directory, what cannot be read."""
    try:
        # First by its name: opening the read end of a FIFO already lets its writer go on.
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except (OSError, ValueError):
        return None
    with open(fd, "rb") as file:
        try:
            return file.read(limit) if stat.S_ISREG(os.fstat(fd).st_mode) else None
        except OSError:
            return None
