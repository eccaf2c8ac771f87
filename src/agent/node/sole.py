"""Who decides for a job on one node: its `control.Job`, in this process. Nothing of many nodes is imported."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...control.job import commands as cmd
from ...control.job import events as ev
from ...control.job.addressing import deliver
from ...control.job.job import Job
from ...control.job.state import JobConfig
from ..config import DEFAULT_BARRIER_TIMEOUT, DEFAULT_START_TIMEOUT, LaunchConfig
from .local import LocalNode
from .timer import Timer

if TYPE_CHECKING:
    import asyncio


class SoleHead:
    """Gives events to the job and its commands to the node."""

    def __init__(self, config: LaunchConfig, node: LocalNode, on_end: Callable[[cmd.End], None]) -> None:
        self._job = Job(job_config(config))
        self._node = node
        self._on_end = on_end
        self._timer = Timer(self._job.next_deadline, lambda: self.handle(ev.TimePassed()))

    def begin(self) -> None:
        """Before there is an event loop: the first processes start now."""
        self.handle(ev.Begin())

    async def serve(self, loop: asyncio.AbstractEventLoop) -> None:
        """There is nobody else to listen to; the job's deadlines are kept from now on."""
        self._timer.start(loop)

    def handle(self, event: ev.Event) -> None:
        for command in self._decide(event):
            if isinstance(command, cmd.End):
                self._on_end(command)
                continue
            for _, addressed in deliver(self._job.state, command, (0,)):
                self._node.execute(addressed)
        self._timer.set()

    def _decide(self, event: ev.Event) -> list[cmd.Command]:
        """What the job makes of an event. One that it cannot take costs the worker that sent it."""
        try:
            return list(self._job.handle(event, time.monotonic()))
        except Exception as error:
            if not self._node.blame(event, error):
                raise
            return []

    def conclude(self) -> None:
        """The launch is over: no deadline counts any more."""
        self._timer.stop()

    def close(self) -> None:
        """Nothing is open."""


def job_config(config: LaunchConfig) -> JobConfig:
    """What of the launch concerns the decisions."""
    limit = config.inprocess_timeout
    return JobConfig(
        world_size=config.nproc_per_node,
        in_process=config.inprocess_restart,
        max_restarts=config.max_restarts,
        max_inprocess_restarts=config.max_inprocess_restarts,
        barrier_timeout=DEFAULT_BARRIER_TIMEOUT if limit is None else limit,
        start_timeout=DEFAULT_START_TIMEOUT if limit is None else limit,
        shutdown_timeout=config.shutdown_timeout,
        pre_train=bool(config.pre_train),
        post_train=bool(config.post_train),
        min_nodes=config.nodes[0],
        max_nodes=config.nodes[1],
        join_timeout=600.0 if config.cluster is None else config.cluster.join_timeout,
    )
