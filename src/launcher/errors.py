"""How `main` says that a job has not succeeded. The console script makes exit codes of it.

A program that catches torchelastic's exceptions, or wears its `@record`, meets ours where it met those: where the
program has imported torch, ours are made of torch's class too. This module never imports torch itself.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import signal

    from ..agent.output.failures import ProcessFailure

_Error = TypeVar("_Error", bound="LaunchError")
_ELASTIC = "torch.distributed.elastic.multiprocessing"


class LaunchError(Exception):
    """The job was started, or should have been, and has not succeeded."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        Exception.__init__(self, message)  # not super(): torch's class, where it is a base too, takes other arguments
        self.exit_code = exit_code


class UsageError(LaunchError, ValueError):
    """The command line or a `PET_*` variable is wrong: one sentence."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 2)


class ChildFailedError(LaunchError):
    """Workers failed. The fields of torchelastic's exception of the same name; its text is the failure banner."""

    def __init__(self, name: str, failures: dict[int, ProcessFailure], exit_code: int = 1) -> None:
        self.name = name
        self.failures = failures
        """By global rank, in the order in which they were seen."""
        from ..agent.output.banner import failure_banner

        super().__init__(failure_banner(name, failures, *self.get_first_failure()), exit_code)

    def get_first_failure(self) -> tuple[int, ProcessFailure]:
        """The rank that failed first, and how."""
        rank = min(self.failures, key=lambda rank: self.failures[rank].timestamp)
        return rank, self.failures[rank]

    def __reduce__(self) -> tuple[Any, ...]:
        """For who launches in a process of a pool: the class is found, or made, where the error arrives."""
        return child_failed, (self.name, self.failures, self.exit_code)


class SignalException(LaunchError):
    """A signal ended the job."""

    def __init__(self, message: str, sigval: signal.Signals) -> None:
        super().__init__(message, 128 + sigval)
        self.sigval = sigval

    def __reduce__(self) -> tuple[Any, ...]:
        return stopped_by_signal, (self.args[0], self.sigval)


def child_failed(name: str, failures: dict[int, ProcessFailure], exit_code: int = 1) -> ChildFailedError:
    """A ChildFailedError, of torch's class as well if the program knows it."""
    return _with_torchs(ChildFailedError, f"{_ELASTIC}.errors")(name, failures, exit_code)


def stopped_by_signal(message: str, sigval: signal.Signals) -> SignalException:
    """A SignalException, of torch's class as well if the program knows it."""
    return _with_torchs(SignalException, f"{_ELASTIC}.api")(message, sigval)


def _with_torchs(ours: type[_Error], module: str) -> type[_Error]:
    """A class that is ours and the one of the same name in torch's `module`, or ours where there is no torch."""
    if "torch" not in sys.modules:
        return ours
    try:
        theirs = getattr(importlib.import_module(module), ours.__name__)
        return type(ours.__name__, (ours, theirs), {"__module__": ours.__module__, "__doc__": ours.__doc__})
    except Exception:  # a torch without it, or one that is broken: the job's own failure matters more
        return ours
