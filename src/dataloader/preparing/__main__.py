"""`python -m hyperpodrun.dataloader.preparing`: the start of a host of producers. Not for people.

With `--detach` the host is nobody's child: whoever starts it need not wait for it, and may end before it does.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="hyperpodrun.dataloader.preparing")
    parser.add_argument("--listener", type=int, required=True, help="descriptor of the listening socket")
    parser.add_argument("--token", required=True, help="the job's mark")
    parser.add_argument("--runtime", type=Path, required=True, help="a directory of this job's own")
    parser.add_argument("--detach", action="store_true", help="return at once")
    parser.add_argument("--users-only", action="store_true", help="end with the last user")
    parser.add_argument("--watch", type=int, action="append", default=[], metavar="PID", help="counts as a user")
    options = parser.parse_args(argv)
    if options.detach and os.fork() != 0:
        os._exit(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _ends_on_signal)
    listener = socket.socket(fileno=options.listener)
    listener.set_inheritable(False)
    from . import standalone  # with torch, for which whoever has detached it does not wait
    from .host import Host

    host = Host(listener, options.token, options.runtime, options.watch, options.users_only)
    try:
        host.run()
    finally:
        if options.users_only:
            host.clean_up()
            standalone.withdraw(options.runtime)
    return 0


def _ends_on_signal(signum: int, frame: Any) -> None:
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
