"""What the forked processes of this package have in common: how they end, and how they speak to people."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

from ...protocol.seldom import Seldom

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_libc = ctypes.CDLL(None, use_errno=True)
_seldom = Seldom()


def log(event: str, **fields: object) -> None:
    """One line for people, in the form of the agent's own."""
    text = " ".join(
        f"{name}={str(value)!r}" if " " in str(value) else f"{name}={value}" for name, value in fields.items()
    )
    sys.stderr.write(f"hyperpodrun: {event} {text}\n")
    sys.stderr.flush()


def log_seldom(event: str, **fields: object) -> None:
    """The same for what anybody who connects can cause: one line a minute of each kind."""
    left_out = _seldom.due(event, time.monotonic())
    if left_out is not None:
        log(event, **fields, **({"more_of_them": left_out} if left_out else {}))


def die_with_parent(parent: int, name: str) -> None:
    """To be called first in a forked child; `name` is what `ps` and `top` show."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    _libc.prctl(_PR_SET_NAME, name.encode()[:15])


def describe_exit(status: int) -> str:
    """`signal 9` or `exit code 1`, of what `waitpid` gave."""
    code = os.waitstatus_to_exitcode(status)
    return f"signal {-code}" if code < 0 else f"exit code {code}"
