"""`CheckpointManager`: what a training script says to become recoverable without checkpoints.

    manager = CheckpointManager()

    @HPWrapper(checkpoint_manager=manager)
    def run_main(args, caller: Optional[HPCallWrapper] = None):
        dist.init_process_group("nccl")
        manager.register(model=model, optimizer=optimizer, scheduler=scheduler, sampler=sampler)
        manager.restore()                                   # after a fault: from a healthy peer's memory
        ddp = manager.data_parallel(model)
        for step in manager.steps(args.steps):              # goes on with the very step that was interrupted
            ...

The name and the first two arguments are HyperPod's; there the state is saved at the fault and everything falls to
disk when survivors differ by a step. Here nothing is saved: what training uses *is* the copy, and a note of the small
things a step changes (`state/small.py`) lets an interrupted step be repeated exactly.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from ..protocol.plan import Holding, Origin
from .arrivals import ArrivalOrders
from .caller import Caller, NoCaller
from .ddp import Arranger
from .errors import LocalStateLost, UnsupportedStateError
from .state.fingerprint import digest
from .state.names import Names, same_objects
from .state.registry import Registry
from .state.replicas import Replicas, shard_name
from .state.small import SmallState
from .step.history import History
from .step.observers import observers_of, watch_unregistered
from .step.prologue import Prologue
from .step.rollback import Rollback
from .step.tracker import Learned, StepTracker
from .step.update import Update
from .transfer.copies import Copies, state_directory
from .transfer.disk import DiskCheckpoints
from .transfer.handover import Handover
from .transfer.restore import Restorer
from .transfer.snapshots import Snapshots

_log = logging.getLogger("hyperpodrun.checkpointless")


class CheckpointManager:
    """Carries the state of training over faults. One per process, made before the wrapped function is called.

    Args:
        enable_checksum: every bucket of state that moves is checked; a rank that sends wrong bytes is not used again.
        enable_offload: after a fault the state waits in host memory until the objects built anew are registered, so
            that the accelerator never holds it twice. Only for objects that are built inside the wrapped function.
        replicas: ranks for which this function of the rank gives the same value hold the same bytes. None: read off
            the parameters (DDP, FSDP2 with a replicate dimension, ZeroRedundancyOptimizer with subgroups).
        rollback: keep the state before the last update on the host, for updates that are not complete everywhere;
            costs one copy of the state per step. None: in loops that need it, where the state is small (64 MB). False:
            in the first pass of a loop only, of which nothing is known, if there is memory to spare.
        snapshot_every: every so many steps each rank's state is copied to host memory in the background, on this node
            and on another one, for the loss of everybody who holds it. None: never.
        disk_path: a directory all ranks see, for checkpoints in the background (torch.distributed.checkpoint), the
            last resort, also where a job begins anew. None: none.
        disk_every: steps between two checkpoints on disk.
    """

    def __init__(
        self,
        enable_checksum: bool = False,
        enable_offload: bool = False,
        *,
        replicas: Replicas | None = None,
        rollback: bool | None = None,
        snapshot_every: int | None = None,
        disk_path: str | os.PathLike[str] | None = None,
        disk_every: int = 1000,
    ) -> None:
        for name, value in (("snapshot_every", snapshot_every), ("disk_every", disk_every)):
            if value is not None and value < 1:
                raise ValueError(f"CheckpointManager: {name} must be at least 1, not {value}")
        self._checksum = enable_checksum
        self._replicas = replicas
        self._caller: Caller = NoCaller()
        self._call = 0
        self._registry: Registry | None = None
        self._names = Names()
        self._structure: tuple[Any, ...] = ()
        self._shard: str | None = None
        self._history = History()
        self._tracker = StepTracker()
        self._orders = ArrivalOrders()
        self._arranger = Arranger(self._orders)
        self._handover = Handover(offload=enable_offload)
        self._copies = Copies(
            Snapshots(snapshot_every) if snapshot_every is not None else None,
            DiskCheckpoints(Path(disk_path), disk_every) if disk_path is not None else None,
        )
        self._prologue = Prologue()
        self._update = Update(self._tracker, self._history, Rollback(rollback), self._copies.snapshots)
        self._whole = False
        """Parameters and optimizer are those of one step: not before the first restore, nor where one was left while it
        changed them. (Who only gave, or kept what it had, can give in the next epoch.)"""
        self._ready = False
        """Restored in this epoch."""
        self._stop: int | None = None
        """The end of the loop of `steps()`, from its first step of this epoch to its last."""
        self._distrusted: set[int] = set()
        self._refused: set[int] = set()
        """Steps that this rank cannot go on from: what only it knew of them is lost."""
        self._compared = False
        """Whether the agents have been told in this epoch what this rank holds."""
        self._said_unchecked = False
        self._observers = observers_of(self)

    # ---- for the training script -----------------------------------------------------------------------------------

    def register(self, **objects: Any) -> None:
        """Says what training must carry over a fault, by name.

        Modules, optimizers, schedulers, a GradScaler, random generators, a `StateProvider`, and anything with
        `state_dict` and `load_state_dict` that a step reads or changes, such as a data loader's position; the global
        generators of torch, CUDA, numpy and Python are always carried. Objects may be kept alive over restarts or built
        anew each time; the names must stay the same. Call it when the model has its final shape (after `fully_shard`).

        A further call adds to what was registered before it; the same name stands for the object of the last call. To
        be called again after a change of shape (a parameter group more, other layers), with the same names.

        Raises UnsupportedStateError, a TypeError, for an object of which something would not be carried.
        """
        objects = self._names.with_earlier(objects)
        if self._registry is not None and same_objects(objects, self._registry.objects):
            if self._registry.structure() == self._structure:
                return
            ready = self._ready
        else:
            ready = False
        self._update.listen()
        registry = Registry(objects)
        self._names.registered(objects)
        if self._registry is not None:
            self._update.release()
            if not ready:
                self._handover.replaces(self._registry)
        self._registry = registry
        self._structure = registry.structure()
        self._prologue.registered(registry)
        self._arranger.registered(registry)
        self._update.watch(registry)
        self._ready = ready

    def restore(self) -> int:
        """Brings this rank to where the recovery plan wants it; the step to go on with, 0 at the first start.

        To be called on every rank when the process group is up and everything is registered, before the model is
        wrapped in DDP. Raises RestoreError; then this epoch has failed and the next one tries another way.
        """
        registry = self._registered()
        registry.state.quiesce()
        self._update.writes.restoring()
        self._update.pause()
        self._shard = shard_name(self._caller.rank, registry.state, self._replicas)
        self._caller.registered(self._shard)
        directory = state_directory()
        self._history.open(directory / f"rank-{self._caller.rank}" if directory is not None else None)
        self._copies.start(self._caller.rank)
        with self._caller.restoring():
            self._handover.hand_over(registry, whole=self._holds_whole())
            restorer = Restorer(
                registry,
                self._history,
                self._tracker,
                self._orders,
                rank=self._caller.rank,
                shard=self._shard,
                checksum=self._checksum,
                kept=self._update.kept,
                snapshots=self._copies.snapshots,
                disk=self._copies.disk,
                on_change=self._begin_change,
            )
            try:
                small = restorer.run(self._caller.plan)
            except LocalStateLost as error:
                self._refused.add(error.step)
                raise
            finally:
                if restorer.distrusted is not None:
                    self._distrusted.add(restorer.distrusted)
            registry.state.arrived()
        registry.state.reset()
        self._history.begin_with(small, registry.taker, kept=None if restorer.changed else self._kept_step())
        self._tracker.go_to(small.step)
        self._orders.go_to(small.step)
        self._tracker.sharded = bool(self._shard) and self._caller.world_size > 1
        plan = self._caller.plan
        nothing = plan is None or plan.origin is Origin.START or (small.step == 0 and not self._update.begun)
        self._update.resume(small, anew=nothing)
        self._arranger.restored(resumed=small.step > 0)
        self._whole = self._ready = True
        self._compared = False
        self._refused.clear()
        return small.step

    @property
    def resuming(self) -> bool:
        """Whether `restore` will bring state that training has made: what a checkpoint has is older. False outside of
        the wrapped function, and where training begins."""
        plan = self._caller.plan
        return plan is not None and plan.origin is not Origin.START

    def data_parallel(self, module: torch.nn.Module, **settings: Any) -> torch.nn.parallel.DistributedDataParallel:
        """`DistributedDataParallel(module, **settings)` that rounds after a restart as it did before.

        So does one that is made by hand, or by a library, if it is made after `restore`: this is only its shorter name.
        On every rank, inside the function.
        """
        return DistributedDataParallel(module, **settings)

    def steps(self, stop: int) -> Iterator[int]:
        """The steps that are left up to `stop`, beginning with the one to be repeated: the loop of training."""
        if not self._ready:
            self.restore()
        self._stop = stop
        if self._tracker.index >= stop:
            self._update.nothing_left()
        while self._tracker.index < stop:
            self._begin()
            yield self._tracker.index
            self.end_step()
        self.end_steps()

    def begin_step(self, step: int | None = None, *, settled: bool = False) -> None:
        """A step begins. `steps` calls it; it is for training loops that belong to somebody else.

        `step`: the number that the loop gives it, from 0. Raises UnsupportedStateError where another one is due, as
        after a restart for a loop that begins at 0 although `restore` has said 8. A loop that does not tell cannot be
        checked: after a restart that is said once.

        `settled`: between two steps the loop draws random numbers and moves what is registered (an evaluation, a log),
        and after a restart it has brought all of that to where it was here; nothing is put back.
        """
        self._tracker.learned.external = True
        self._check_step(step)
        self._begin(settled=settled)

    def noted(self) -> SmallState:
        """What the step that `restore` has given is to begin with on this rank. `begun`: it had begun here; otherwise
        the loop was still between it and the step before."""
        return self._history[self._tracker.point]

    def _begin(self, *, settled: bool = False) -> None:
        self._update.begin(settled=settled)
        for observer in self._observers:
            observer.begin()

    def _check_step(self, step: int | None) -> None:
        due = self._tracker.index
        if step is None:
            if self._update.first_pass and due and not self._said_unchecked:
                self._said_unchecked = True
                _log.warning(
                    "begin_step() was not told its step: restore() has said %d, and whether the loop goes on with that "
                    "one cannot be seen. begin_step(step) has it checked",
                    due,
                )
        elif step != due:
            raise UnsupportedStateError(
                f"begin_step({step}): step {due} is due, as restore() has said, so the loop trains other steps than it "
                "would have without the fault; let it begin with the step that restore() gives"
            )

    def end_step(self) -> None:
        """A step has ended: its update, if there was one, is complete."""
        for observer in self._observers:
            observer.end()
        self._orders.step_ends(self._tracker.index + 1)
        updated = self._update.end()
        for observer in self._observers:
            observer.ended()
        if not updated:
            return
        self._caller.step_completed(self._tracker.point)
        if not self._compared:
            self._compare()
        if self._copies.due(self._tracker.point):
            self._copies.make(
                self._registered(), self._history, self._tracker, self._orders, self._shard or "", self._caller.rank
            )

    def settle(self) -> None:
        """A restarted loop stands where the step to be repeated began, its data too: what it draws from here on it drew
        without the fault. For loops that go back to that very place; others draw on their way to the step."""
        self._update.settle()

    def end_steps(self) -> None:
        """The loop has ended, for one that could not tell `steps` before where its end is."""
        self._stop = None
        self._copies.finish()

    def begin_backward(self) -> None:
        """The gradients of this step are about to leave this process. Seen by itself where a registered module is
        called; to be said before the first collective of the backward pass where none is."""
        self._update.backward_begins()

    def update(self) -> contextlib.AbstractContextManager[None]:
        """Around all that belongs to an update, where registered parts do not show it: an exponential average of the
        weights, a scheduler that moves only at the end of an epoch. No collectives inside: a fault in one would find
        every rank in the middle of its update (with `rollback=True` all go one step back). An update in parts has its
        local part inside: the exchange of gradients comes before, and what can be made again from the result (weights
        gathered from main parameters) comes after; `StateProvider.arrived` makes it again after a restart."""
        return self._update.block()

    @property
    def entry(self) -> tuple[int, Caller]:
        """The call of a wrapped function, counting re-entries as one, and the entry into it."""
        return self._call, self._caller

    # ---- for HPWrapper ---------------------------------------------------------------------------------------------

    def begins_call(self, call: int) -> None:
        """A wrapped function is about to be entered, the `call`-th: nothing of the one before it is state."""
        if call > 1:
            self._whole = False
            self._history.clear()
            self._tracker.go_to(0)
            self._tracker.learned = Learned()
            self._orders.forget()
            self._update.forget()

    def wraps(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What is about to be entered: what it can reach and changes should be registered."""
        self._observers = watch_unregistered(self, self._observers, function, args, kwargs)

    def attach(self, caller: Caller, call: int) -> None:
        """A wrapped function is entered, for the `call`-th time counting re-entries as one."""
        if call != self._call:  # another function: its steps count from 0
            self._call = call
            self._prologue.begin(self._registry)
            self._whole = False
            self._history.clear()
            self._tracker.go_to(0)
        else:
            self._prologue.again()
            if self._holds_whole():
                self._update.writes.entered()
        self._names.entered()
        self._arranger.follow()
        self._caller = caller
        self._update.caller = caller
        self._ready = False
        self._stop = None

    def left(self) -> str:
        """How the function that has returned left its loop before the end; empty where it did not."""
        self._names.returned()
        self._arranger.leave()
        return "" if self._stop is None else f"it left manager.steps({self._stop}) at step {self._tracker.index}"

    def on_restart(self, caller: Any) -> None:
        """User code has been left after a fault."""
        self._orders.step_ends(self._tracker.index + 1)
        self._update.abandon()
        self._copies.stop()
        if self._registry is not None:
            self._handover.offload(self._registry, whole=self._holds_whole())

    def holding(self) -> Holding:
        """What this rank can give to others, for the barrier."""
        kept = self._kept_step()
        whole = self._holds_whole()
        snapshots, disk = self._copies.snapshots, self._copies.disk
        return Holding(
            shard=self._shard,
            step=self._tracker.point if whole else None,
            presumed=whole and self._tracker.presumed,
            torn=self._tracker.why_torn() if self._whole and self._tracker.opened else "",
            refused=tuple(sorted(self._refused)),
            kept=kept if kept in self._history else None,
            snapshots=snapshots.inventory(state_directory()) if snapshots is not None else (),
            disk=disk.newest() if disk is not None else None,
            distrusted=tuple(sorted(self._distrusted)),
        )

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _holds_whole(self) -> bool:
        return self._whole and not self._tracker.opened and self._tracker.point in self._history

    def _kept_step(self) -> int:
        """The step whose state is kept for a rollback; -1: none is."""
        kept = self._update.kept
        return kept.step if kept is not None and kept.step is not None else -1

    def _begin_change(self) -> None:
        """From here on parameters and optimizer are of no step, until the restore is complete."""
        self._whole = False

    def _compare(self) -> None:
        """After the first step of an epoch: says what this rank holds, so that the agents can compare the ranks that
        are taken to hold the same. And what is registered is proven once more, now that there is optimizer state."""
        self._compared = True
        registry = self._registered()
        registry.prove()
        tensors = registry.state.named_tensors()
        groups: dict[str, dict[str, torch.Tensor]] = {}
        parts = registry.state.parts() if self._replicas is None else {}
        for name, value in tensors.items():
            groups.setdefault(parts.get(name, self._shard or ""), {})[name] = value
        self._caller.holds(self._tracker.point, {group: digest(part) for group, part in groups.items()})

    def _registered(self) -> Registry:
        if self._registry is None:
            raise RuntimeError("CheckpointManager: call register(model=..., optimizer=...) first")
        return self._registry
