"""`--logs-specs NAME`: a class of the user's decides where the workers' output goes.

Such a class is torch's (`torch.distributed.elastic.multiprocessing.LogsSpecs`, entry point group
`torchrun.logs_specs`), and the agent never imports torch: it lives in a process of its own (`logs_specs_child.py`),
which is asked once for every attempt and answers in JSON. It imports torch while the agent does other things, and ends
with the agent, whose end of its pipe it reads.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
from typing import TypeVar

import msgspec

from ...protocol.names import OF_AGENTS_ONLY
from .. import processes
from ..config import LaunchConfig

_FIRST_ANSWER_S = 120.0
"""It imports torch before that; on a cold file system this takes a while."""
_ANSWER_S = 10.0
"""The workers of an attempt cannot start without the answer."""
LONGEST_ANSWER_S = _FIRST_ANSWER_S + _ANSWER_S
_END_S = 2.0
"""What it does at its exit must not take longer."""
_MAX_ANSWER_BYTES = 16 << 20
_T = TypeVar("_T")


class LogsSpecsError(processes.CannotStart):
    """The class could not be loaded, or its answer is of no use; the sentence says why."""


class Ready(msgspec.Struct, forbid_unknown_fields=True):
    """The class is loaded."""


class Destinations(msgspec.Struct):
    """Where the class wants the streams of one attempt: torch's LogsDest. By local rank; "" is the console."""

    stdouts: dict[int, str]
    stderrs: dict[int, str]
    tee_stdouts: dict[int, str]
    tee_stderrs: dict[int, str]
    error_files: dict[int, str]
    filtered_stdout: str
    filtered_stderr: str


class Failed(msgspec.Struct):
    """What the class has raised."""

    error: str


class LogsSpecs:
    """The process in which the class lives. Started with the launch, asked once for every attempt."""

    def __init__(self, config: LaunchConfig) -> None:
        self._config = config
        self._attempts: dict[int, Destinations] = {}
        self._loaded = False
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        self._questions, self._answers = open(ours_out, "wb"), open(ours_in, "rb")  # noqa: SIM115  # until `close`
        environment = {name: value for name, value in os.environ.items() if name not in OF_AGENTS_ONLY}
        command = [sys.executable, "-m", f"{__package__}.logs_specs_child"]
        try:
            self._child = processes.start(command, environment, stdin=theirs_in, stdout=theirs_out)
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        ranks = range(config.nproc_per_node)
        self._tell(
            {
                "name": config.logs_specs,
                "log_dir": None if config.log_dir is None else str(config.log_dir),
                "redirects": {rank: config.redirects.streams(rank) for rank in ranks},
                "tee": {rank: config.tee.streams(rank) for rank in ranks},
                "local_ranks_filter": None if config.console_ranks is None else sorted(config.console_ranks),
            }
        )

    def attempt(self, number: int) -> Destinations:
        """Where the output of this attempt goes. Raises LogsSpecsError."""
        if not self._loaded:
            self._answer(Ready, _FIRST_ANSWER_S)
            self._loaded = True
        if number not in self._attempts:
            environment = {
                "TORCHELASTIC_RUN_ID": self._config.run_id,
                "TORCHELASTIC_RESTART_COUNT": str(number),
                "TORCHELASTIC_MAX_RESTARTS": str(self._config.max_restarts),
                "ROLE_NAME": self._config.role,
                "LOCAL_WORLD_SIZE": str(self._config.nproc_per_node),
            }
            ranks = range(self._config.nproc_per_node)
            self._tell({"envs": {rank: {**environment, "LOCAL_RANK": str(rank)} for rank in ranks}})
            self._attempts[number] = self._answer(Destinations, _ANSWER_S)
        return self._attempts[number]

    def close(self) -> None:
        """The launch is over."""
        self._answers.close()
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self._questions.close()
        self._child.gone_within(_END_S)
        self._child.kill()

    def _tell(self, question: dict[str, object]) -> None:
        try:
            self._questions.write(msgspec.json.encode(question) + b"\n")
            self._questions.flush()
        except BrokenPipeError:
            raise self._error("its process has ended") from None

    def _answer(self, kind: type[_T], limit: float) -> _T:
        """The next one. Raises LogsSpecsError also when it does not come in time."""
        poll = select.poll()
        poll.register(self._answers, select.POLLIN)
        if not poll.poll(limit * 1000):
            raise self._error(f"no answer within {limit:g} s")
        line = self._answers.readline(_MAX_ANSWER_BYTES)
        if not line:
            raise self._error("its process has ended")
        try:
            return msgspec.json.decode(line, type=kind)
        except msgspec.MsgspecError as error:
            problem = str(error)
        with contextlib.suppress(msgspec.MsgspecError):  # no failure of the class's, but an answer that is none
            problem = msgspec.json.decode(line, type=Failed).error
        raise self._error(problem)

    def _error(self, reason: str) -> LogsSpecsError:
        return LogsSpecsError(f"--logs-specs {self._config.logs_specs}: {reason}")
