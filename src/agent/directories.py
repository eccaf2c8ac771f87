"""Directories of the launch's own: made with mode 0700 and a name nobody can guess.

What `tempfile` is for; but that imports `random` and with it OpenSSL, 30 ms before the first worker starts.
"""

from __future__ import annotations

import os
from pathlib import Path

_LONGEST_FOR_SOCKETS = 60
"""A socket's path has at most 107 bytes; this much of it may be the temporary directory's."""


def make_private(parent: Path, prefix: str) -> Path:
    """A new directory `<parent>/<prefix><random>`, readable by this user only. Raises OSError if it cannot be made."""
    while True:
        path = parent / f"{prefix}{os.urandom(6).hex()}"
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            continue
        return path


def temporary() -> Path:
    """Where temporary files go: TMPDIR, or /tmp."""
    return Path(os.environ.get("TMPDIR") or "/tmp")


def in_memory() -> Path:
    """Where files are kept in memory: /dev/shm where there is one, or where temporary files go."""
    path = Path("/dev/shm")
    return path if os.access(path, os.W_OK | os.X_OK) else temporary()


def temporary_for_sockets() -> Path:
    """The same, unless its name is too long to hold sockets."""
    path = temporary()
    return path if len(str(path)) <= _LONGEST_FOR_SOCKETS else Path("/tmp")
