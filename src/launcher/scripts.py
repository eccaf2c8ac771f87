"""A script that is in no file: `-`, /dev/stdin, `<(...)`, a FIFO.

It can be read once, and every worker of every attempt needs it: it is read here, and the agent keeps it in a file of
the job's own.
"""

from __future__ import annotations

import os
import re
import select
import stat

import click

from ..agent.reading import LARGEST

STDIN = "-"
_OWN_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/([0-9]{1,9})")


def text_of(script: str) -> bytes | None:
    """Reads it to its end; None where the script is a file or a directory, which workers can read themselves.

    Raises click.UsageError with one sentence.
    """
    fd = _descriptor(script)
    try:
        mode = os.stat(script).st_mode if fd is None else os.fstat(fd).st_mode
        if stat.S_ISDIR(mode) or (stat.S_ISREG(mode) and (fd is None or script == "/dev/stdin")):
            return None
        by_name = fd is None or (stat.S_ISREG(mode) and script != STDIN)  # from its beginning
        text = _read(os.open(script, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY) if by_name else os.dup(fd or 0))
    except OSError as error:
        raise click.UsageError(f"the script {script} cannot be read: {error.strerror}") from None
    if len(text) > LARGEST:
        raise click.UsageError(f"the script {script} does not end within {LARGEST >> 20} MiB")
    if not text and (fd is not None or not stat.S_ISCHR(mode)):
        raise click.UsageError(f"the script {script} is empty: what should write it has written nothing")
    return text


def _descriptor(script: str) -> int | None:
    """Of this process. Workers do not inherit it, and opened by its name a socket is refused."""
    if script in (STDIN, "/dev/stdin"):
        return 0
    match = _OWN_DESCRIPTOR.fullmatch(script)
    return None if match is None else int(match[1])


def _read(fd: int) -> bytes:
    """Until its end, or one byte more than is taken."""
    with open(fd, "rb", buffering=0) as file:
        parts: list[bytes] = []
        size = 0
        while size <= LARGEST:
            try:
                part = file.read(1 << 20)
            except BlockingIOError:
                part = None
            if part is None:  # whoever shares it has made it non-blocking
                select.select([file], [], [])
            elif part:
                parts.append(part)
                size += len(part)
            else:
                break
        return b"".join(parts)
