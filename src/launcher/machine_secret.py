"""The secret of a user on one machine: a job of several agents on loopback addresses is closed to other users with it.

Made on first use, in a file that only its user can read. The place depends on nothing but the user: agents that are
started from different shells, with another HOME or TMPDIR, must find the same one. Called by: `discovery.py`.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

PLACES = ("/tmp", "/var/tmp", "/dev/shm")
"""Of the machine, never of a network. The first in which a directory can be ours alone."""
_BYTES = 32


def machine_secret() -> bytes:
    """Raises OSError with a sentence where no file can be had that only this user can read."""
    reasons = []
    for place in PLACES:
        directory = Path(place, f"hyperpodrun-{os.geteuid()}")
        try:
            return _secret_in(directory)
        except OSError as error:
            reasons.append(f"{directory}: {error.strerror or error}")
    raise OSError("; ".join(reasons))


def _secret_in(directory: Path) -> bytes:
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    found = os.lstat(directory)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise OSError("it is not a directory of this user alone")
    path = directory / "secret"
    if not path.exists():
        _make(path)
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        held = os.fstat(file.fileno())
        if not stat.S_ISREG(held.st_mode) or held.st_uid != os.geteuid() or held.st_mode & 0o077:
            raise OSError(f"{path.name} in it is not a file of this user alone")
        secret = file.read(1024)
    if len(secret) < _BYTES:
        raise OSError(f"{path.name} in it holds no secret: remove it")
    return secret


def _make(path: Path) -> None:
    """Whole, or not at all; whoever is first has made it."""
    draft = path.with_name(f"{path.name}.{os.urandom(6).hex()}")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(os.urandom(_BYTES).hex().encode())
    try:
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()
