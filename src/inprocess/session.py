"""What a worker process has once, for all its wrapped functions: the conversation with the agent and its companions."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading
import time

from ..protocol import messages
from ..protocol.plan import NO_EPOCH
from ..protocol.temporary import keep_sockets_with_the_job
from .aborts.cuda_graphs import GraphWatch
from .aborts.gloo import release_connections
from .aborts.kept_groups import KeptGroups
from .aborts.nccl import wait_for_aborts
from .aborts.unknown import tell_unknown
from .connection import AgentConnection
from .interrupt import Interrupted, InterruptGate
from .leftovers import Leftovers
from .monitor import Monitor
from .rendezvous import RootlessRendezvous
from .update_lock import OptimizerHooks, ParameterUpdateLock

_LONGEST_DESTRUCTION_S = 5.0


class Session:
    """The parts that outlive a wrapped function. Made on the main thread when the first one is called."""

    def __init__(self, connection: AgentConnection, abort_timeout: float | None) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("a function under HPWrapper must be called on the main thread: it is interrupted there")
        keep_sockets_with_the_job()
        self.gate = InterruptGate()
        self.gate.install()
        self.lock = ParameterUpdateLock(self.gate)
        self.rendezvous = RootlessRendezvous()
        self.monitor = Monitor(connection, self.gate)
        self.reaper = Reaper()
        self.leftovers = Leftovers(self.gate)
        self.graphs = GraphWatch()
        self.groups = KeptGroups()
        self.calls = 0
        self.inside = False
        """Whether the main thread is in a wrapped function."""
        self.managed = False
        """A CheckpointManager counts the steps and knows whether the state is whole."""
        self.epoch = NO_EPOCH
        self.restore_begin_ns = 0
        self.restore_end_ns = 0
        self._step_seen = NO_EPOCH
        self._hooks = OptimizerHooks(self.lock, self.finish_gradients, self.optimizer_stepped)
        self.monitor.send(messages.Attach(os.getpid(), abort_timeout))
        # A process that ends while a thread is in a group's destructor is aborted by the C++ runtime.
        atexit.register(self.reaper.join, _LONGEST_DESTRUCTION_S)
        atexit.register(wait_for_aborts, _LONGEST_DESTRUCTION_S)
        atexit.register(self.monitor.close)

    def prepare(self) -> None:
        """What needs torch; the caller's script has imported it, or will at once."""
        self.rendezvous.install()
        self._hooks.install()
        self.graphs.install()
        self.groups.install()
        # What exists now, modules above all, is there to stay: the collections after a fault need not look at it. It
        # is not collected first, that takes 100 ms and finds nothing.
        gc.freeze()

    def enter(self, start: messages.Start) -> None:
        """An epoch begins: its environment, its store keys, its state of restore."""
        os.environ.update(start.environ)
        self.epoch = self.graphs.epoch = start.epoch
        release_connections()
        self.reaper.drop(self.groups.take_destroyed())
        self.rendezvous.enter(start.epoch)
        self.restore_begin_ns = self.restore_end_ns = 0
        self.lock.force_release()
        if start.plan is None:
            return
        if start.plan.source is None:
            self.lock.restored(0)
        elif int(start.environ["RANK"]) in start.plan.receivers:
            self.lock.begin_restore(start.plan.target_step)

    def finish_gradients(self) -> None:
        """Parameters are about to change. Raises Interrupted when the epoch has failed.

        On a GPU the host must not run ahead of the collectives: kernels that are queued behind an aborted all-reduce
        would update the parameters with whatever it has left behind. And the wait is no part of the update: who waits
        for gradients that will never come has changed nothing.
        """
        torch = sys.modules["torch"]
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
            if self.monitor.faulted(self.epoch):
                raise Interrupted("the epoch has failed on another rank")

    def optimizer_stepped(self) -> None:
        """An optimizer has stepped. Where a CheckpointManager counts, that is not yet a completed step."""
        if not self.managed:
            self.step_completed()

    def step_completed(self, step: int | None = None) -> None:
        """A step has completed. The agent hears of the first in an epoch: that is the end of a recovery."""
        self.lock.steps = self.lock.steps + 1 if step is None else step
        self.lock.restored()  # a step that completed with everybody else's was made from a whole state
        if self._step_seen != self.epoch:
            self._step_seen = self.epoch
            tell_unknown()
            self.monitor.send(
                messages.Stepped(
                    self.epoch,
                    self.lock.steps,
                    self.restore_begin_ns,
                    self.restore_end_ns,
                    time.monotonic_ns(),
                )
            )


class Reaper:
    """Drops objects whose destructors take long, on a thread of its own."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def drop(self, remains: list[object]) -> None:
        """Gives up the list's items: the caller must hold no other reference to them."""
        if remains:
            self._thread = threading.Thread(target=remains.clear, name="hyperpodrun-reaper", daemon=True)
            self._thread.start()

    def join(self, timeout: float) -> None:
        if self._thread is not None:
            self._thread.join(timeout)


_session: Session | None = None


def current_session(connection: AgentConnection | None, abort_timeout: float | None) -> Session:
    """The session of this process; `connection` is used when it is made."""
    global _session
    if _session is None:
        if connection is None:
            raise RuntimeError("there is no connection to the agent")
        _session = Session(connection, abort_timeout)
        _session.prepare()
    return _session


def has_session() -> bool:
    return _session is not None
