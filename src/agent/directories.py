"""Directories of the launch's own: made with mode 0700 and a name nobody can guess.

What `tempfile` is for; but that imports `random` and with it OpenSSL, 30 ms before the first worker starts.
"""

from __future__ import annotations

import contextlib
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
    """Where temporary files go: the first of `tempfile`'s places in which a file can be written. Raises OSError."""
    return _first_usable(_places())


def in_memory() -> Path:
    """Where files are kept in memory: /dev/shm where there is one, or where temporary files go."""
    path = Path("/dev/shm")
    return path if os.access(path, os.W_OK | os.X_OK) else temporary()


def temporary_for_sockets() -> Path:
    """The same as `temporary`, of places whose names are short enough for the paths of sockets."""
    return _first_usable([place for place in _places() if _holds_sockets(place)])


def _places() -> list[Path]:
    named = [os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP")]
    places = [os.path.abspath(name) for name in named if name] + ["/tmp", "/var/tmp", "/usr/tmp"]
    with contextlib.suppress(OSError):  # it was removed
        places.append(os.getcwd())
    return [Path(place) for place in dict.fromkeys(places)]


def _holds_sockets(place: Path) -> bool:
    try:
        name = str(place).encode()  # ZeroMQ wants UTF-8
    except UnicodeEncodeError:
        return False
    return len(name) <= _LONGEST_FOR_SOCKETS


def _first_usable(places: list[Path]) -> Path:
    """A file is written, as `tempfile` does it: permissions do not tell of a full disk, or of a server's own mind."""
    for place in places:
        probe = place / f"hyperpodrun-probe-{os.urandom(6).hex()}"
        try:
            fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError:
            continue
        try:
            os.write(fd, b"probe")
            return place
        except OSError:
            continue
        finally:
            os.close(fd)
            os.unlink(probe)
    raise OSError(f"temporary files can be written nowhere: {', '.join(map(str, places))} (TMPDIR)")
