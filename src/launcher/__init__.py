"""The `hyperpodrun` command. It never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import ChildFailedError, LaunchError, SignalException, UsageError

__all__ = ["ChildFailedError", "LaunchError", "SignalException", "UsageError", "entry_point", "main"]


_PUBLISH_LIMIT_S = 5.0


def main(args: Sequence[str] | None = None) -> None:
    """Runs one launch from command-line arguments (default: those of this process), on the main thread.

    Returns when every worker has succeeded. Raises ChildFailedError if one has not, SignalException if a signal ended
    the job, UsageError for a wrong command line, and LaunchError, of which they all are, for whatever else failed.
    """
    from .command import run
    from .errors import ChildFailedError

    try:
        run(args)
    except ChildFailedError as error:
        _publish(error)
        raise


def entry_point() -> None:
    """The console script: the same, with exit codes."""
    import gc
    import os
    import signal
    import sys

    for fd in (0, 1, 2):  # one that was closed would be given to the next file or socket, and workers write to it
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)

    def stopped(signum: int, frame: object) -> None:
        sys.exit(128 + signum)

    # While the agent does not handle them yet, or no more.
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, stopped)
    from .errors import ChildFailedError, LaunchError, SignalException, UsageError
    from .subcommands import run_subcommand, subcommand

    try:
        name = subcommand(sys.argv[1:])
        if name is not None:
            sys.exit(run_subcommand(name, sys.argv[2:]))
        main()
    except UsageError as error:
        print(f"hyperpodrun: {error} (hyperpodrun --help lists the options)", file=sys.stderr)
        sys.exit(error.exit_code)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except SignalException as error:
        sys.exit(error.exit_code)
    except LaunchError as error:
        print(f"hyperpodrun: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    finally:
        gc.freeze()  # the interpreter need not look for garbage in a process that is about to end: 30 ms


def _publish(error: ChildFailedError) -> None:
    """For the scheduler that started this process."""
    import os
    import sys
    from pathlib import Path

    from ..agent.output.disk import Disk
    from ..agent.output.error_files import publish

    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        try:
            Disk().call(lambda: publish(error.get_first_failure()[1], Path(path)), _PUBLISH_LIMIT_S)
        except OSError as problem:  # the job's own failure matters more
            print(f"hyperpodrun: cannot write TORCHELASTIC_ERROR_FILE: {problem}", file=sys.stderr)


def __getattr__(name: str) -> Any:
    if name not in ("ChildFailedError", "LaunchError", "SignalException", "UsageError"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import errors

    return getattr(errors, name)
