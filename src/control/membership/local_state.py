"""What one agent knows of the job's part on its node: enough for a new controller to go on from.

Follows the commands that are carried out here and the events that happen here. Decides nothing.
"""

from __future__ import annotations

from msgspec.structs import replace

from ..job import commands as cmd
from ..job import events as ev
from .messages import JobMemory, LocalWorker, Report


class LocalState:
    """The live processes of this node, by incarnation, and the newest memory of the job."""

    def __init__(self) -> None:
        self.workers: dict[int, LocalWorker] = {}
        self.epoch = -1
        self.memory = JobMemory()
        self.completed: set[int] = set()
        self._layout: cmd.Layout | None = None
        self._layout_at = (0, 0)
        self._hook = False

    def report(self, configuration: tuple[int, int]) -> Report:
        return Report(
            configuration,
            self.epoch,
            self._layout,
            self._layout_at,
            tuple(self.workers.values()),
            tuple(sorted(self.completed)),
            "running" if self._hook else "",
            self.memory,
        )

    def remember(self, memory: JobMemory | None) -> None:
        if memory is None:
            return
        known = self.memory
        if memory.shards is None or memory.shards_at < known.shards_at:
            memory = replace(memory, shards=known.shards, shards_at=known.shards_at)
        if memory.at > known.at:
            self.memory = memory
            self.epoch = max(self.epoch, memory.next_epoch - 1)
        elif memory.shards_at > known.shards_at:
            self.memory = replace(known, shards=memory.shards, shards_at=memory.shards_at)

    def learn(self, report: Report) -> None:
        """What another node knows counts also when that is lost before there is a job again."""
        self.remember(report.memory)
        self.epoch = max(self.epoch, report.epoch)

    def forget(self) -> None:
        """This node is no member any more: it holds no place. What it knows of the epochs' numbers stays."""
        self._layout = None
        self._layout_at = (0, 0)
        self.completed.clear()
        self.memory = JobMemory()

    def ordered(self, command: cmd.Command, at: tuple[int, int]) -> None:
        """A command is about to be carried out."""
        match command:
            case cmd.Spawn():
                self.epoch = max(self.epoch, command.epoch)
                self._take_layout(command.layout, at)
                self.completed.discard(command.local_rank)
                self.workers[command.incarnation] = LocalWorker(
                    command.rank, command.local_rank, command.incarnation, command.epoch
                )
            case cmd.OpenEpoch():
                self.epoch = max(self.epoch, command.epoch)
            case cmd.FailEpoch():
                self.epoch = max(self.epoch, command.epoch, command.next_epoch)
                for worker in self._doing("running", "completed"):
                    if worker.epoch == command.epoch:
                        self._put(worker, doing="unwinding")
            case cmd.StartEpoch():
                self._start(command, at)
            case cmd.FinishEpoch():
                for worker in self._doing("completed", "running"):
                    if worker.epoch == command.epoch:
                        self._put(worker, doing="between")
            case cmd.RunHook():
                self._hook = True

    def happened(self, event: ev.Event) -> None:
        """An event of a process of this node."""
        if isinstance(event, ev.HookEnded):
            self._hook = False
            return
        worker = self.workers.get(event.incarnation) if isinstance(event, ev.WorkerEvent) else None
        if worker is None:
            return
        match event:
            case ev.Attached():
                self._put(worker, abort_timeout=event.abort_timeout)
            case ev.Arrived():
                self._put(worker, doing="waiting", arrival=event, fault=None)
            case ev.Faulted():
                if worker.doing == "running" and event.epoch == worker.epoch:
                    self._put(worker, fault=event)
            case ev.Registered():
                self._put(worker, shard=event.shard)
            case ev.Stepped():
                self._put(worker, stepped=max(worker.stepped, event.epoch))
            case ev.Completed():
                if worker.doing == "running" and event.epoch == worker.epoch:
                    self._put(worker, doing="completed")
            case ev.Exited():
                del self.workers[worker.incarnation]
                if event.exit_code == 0:
                    self.completed.add(worker.local_rank)

    def rank_of(self, incarnation: int) -> int | None:
        worker = self.workers.get(incarnation)
        return None if worker is None else worker.rank

    def _start(self, command: cmd.StartEpoch, at: tuple[int, int]) -> None:
        self.epoch = max(self.epoch, command.epoch)
        self._take_layout(command.layout, at)
        for slot in command.slots:
            worker = self.workers.get(slot.incarnation)
            if worker is not None:
                self._put(worker, rank=slot.rank, doing="running", epoch=command.epoch, fault=None)

    def _take_layout(self, layout: cmd.Layout, at: tuple[int, int]) -> None:
        self._layout, self._layout_at = layout, at

    def _doing(self, *what: str) -> list[LocalWorker]:
        return [worker for worker in self.workers.values() if worker.doing in what]

    def _put(self, worker: LocalWorker, **changes: object) -> None:
        self.workers[worker.incarnation] = replace(worker, **changes)
