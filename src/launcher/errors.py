"""How `main` says that a job has not succeeded. The console script makes exit codes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import signal

    from ..agent.output.failures import ProcessFailure


class LaunchError(Exception):
    """The job was started, or should have been, and has not succeeded."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class UsageError(LaunchError):
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


class SignalException(LaunchError):
    """A signal ended the job."""

    def __init__(self, message: str, sigval: signal.Signals) -> None:
        super().__init__(message, 128 + sigval)
        self.sigval = sigval
