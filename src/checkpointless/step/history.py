"""The small states of the last steps: in this process for itself, in the rank's record for its successor."""

from __future__ import annotations

import logging
from pathlib import Path

from ..state.generators import States
from ..state.small import SmallState, SmallStateTaker
from .device_record import DeviceRecord, read_device_record
from .record import RankRecord, read_forward, read_reach, read_record

_log = logging.getLogger("hyperpodrun.checkpointless")

_KEPT = 3
"""The point that can be gone back to, the one before it, and the next one, which is noted before it is reached."""


class History:
    """By step. `open` begins the record; without it they are kept in this process only."""

    def __init__(self) -> None:
        self._states: dict[int, SmallState] = {}
        self._record: RankRecord | None = None
        self._path: Path | None = None
        self._recorded: SmallState | None = None
        """The last one that went into the record."""
        self._device_record: DeviceRecord | None = None
        self._device_taker: SmallStateTaker | None = None

    def open(self, path: Path | None) -> None:
        """Where the rank's record is; one that is open already is closed when it is another rank's."""
        if path == self._path:
            return
        if self._record is not None:
            self._record.close()
        self._close_device_record()
        self._path, self._recorded, self._record = path, None, None
        if path is None:
            return
        try:
            self._record = RankRecord(path)
        except OSError as error:
            self._go_without(error)

    def _go_without(self, error: OSError) -> None:
        """Memory is full, most likely. Training goes on: the record matters only if this process is lost."""
        if self._record is not None:
            self._record.close()
            self._record = None  # and not written again: what it says must not reach over what is missing
        _log.warning(
            "random generators and data position are not recorded in %s: %s; a process that replaces this one goes on "
            "with those of its replica",
            "nothing" if self._path is None else self._path.parent,
            error,
        )

    def clear(self) -> None:
        self._states.clear()

    def __contains__(self, step: int) -> bool:
        return step in self._states

    def __getitem__(self, step: int) -> SmallState:
        return self._states[step]

    def get(self, step: int) -> SmallState | None:
        return self._states.get(step)

    @property
    def latest(self) -> SmallState | None:
        return self._states[max(self._states)] if self._states else None

    def begin_with(self, small: SmallState, taker: SmallStateTaker, *, kept: int | None = None) -> None:
        """State has been restored: what was noted before is of another past, except for the step `kept`."""
        self._states = {step: old for step, old in self._states.items() if step == kept} | {small.step: small}
        self._write(small, taker, ())
        self._note_device(small.step, taker)

    def take(
        self,
        step: int,
        taker: SmallStateTaker,
        keep: tuple[int, int],
        *,
        local_only: bool = False,
        late: frozenset[str] = frozenset(),
    ) -> SmallState:
        """Notes the state now as that before `step`. Those of the steps in `keep` stay.

        `local_only`: only what a successor would need; the rest has yet to move. `late`: items that may still change.
        """
        small = self._states[step] = taker.take(step, self.latest, local_only=local_only)
        small.late, small.final = late, not local_only
        while len(self._states) > _KEPT:
            del self._states[next(old for old in self._states if old != step and old not in keep)]
        if (
            self._recorded is None
            or self._recorded.taken_by is not taker
            or not taker.same_local(self._recorded, small)
        ):
            self._write(small, taker, keep)
        elif self._record is not None:
            self._record.reach(step)
        self._note_device(step, taker)
        return small

    def foresee(self, step: int, taker: SmallStateTaker, keep: tuple[int, int], late: frozenset[str]) -> SmallState:
        """Notes what a successor would need of the state before `step`, should this process not get there itself; the
        state now."""
        if late or self._recorded is None or self._recorded.late or not taker.is_in_local(self._recorded):
            return self.take(step, taker, keep, local_only=True, late=late)
        if self._record is not None:
            self._record.reach(step)
        return self._recorded

    def note_forward(self, step: int, taker: SmallStateTaker, states: States, keep: tuple[int, int]) -> None:
        """What the first forward pass of `step` found in the generators. Said in the record only where it is not what
        the step began with."""
        small = self._states[step]
        if small.forward is states:
            return
        small.forward = states
        if states is not small.generators:
            self._write(small, taker, keep)
        elif self._record is not None:
            self._record.forward(step)

    def settle(self, small: SmallState, taker: SmallStateTaker, keep: tuple[int, int]) -> None:
        """The step that is about to begin, begins with this."""
        self._states[small.step] = small
        self._write(small, taker, keep)
        self._note_device(small.step, taker)

    def rewrite(self, small: SmallState, taker: SmallStateTaker, keep: tuple[int, int]) -> None:
        """What was noted has been corrected."""
        self._write(small, taker, keep)

    def of_predecessor(self, step: int) -> SmallState | None:
        """What the process that had this rank before noted of `step`; None when it was on another node."""
        payload = read_record(self._path, step) if self._path is not None else None
        if self._path is None or payload is None:
            return None
        small = SmallStateTaker.from_bytes(step, payload)
        # What has reached a later step has ended the one before this, and would have noted it anew had it changed.
        small.final |= step < read_reach(self._path)
        if small.forward is None and read_forward(self._path) == step:
            small.forward = small.generators
        on_device = read_device_record(_beside(self._path), step)
        small.buffers |= {name: (-1, contents) for name, contents in on_device.items()}
        return small

    def _write(self, small: SmallState, taker: SmallStateTaker, keep: tuple[int, ...]) -> None:
        if self._record is not None:
            try:
                self._record.write(small.step, taker.local_bytes(small), keep)
            except OSError as error:
                self._go_without(error)
        self._recorded = small

    def _note_device(self, step: int, taker: SmallStateTaker) -> None:
        if self._path is None or not taker.on_device:
            return
        if taker is not self._device_taker:
            self._close_device_record()
            self._device_taker = taker
            try:
                self._device_record = DeviceRecord(_beside(self._path), taker.on_device)
            except OSError as error:
                _log.warning("buffers on the GPU are not recorded, a lost rank has those of its replica: %s", error)
        if self._device_record is not None:
            self._device_record.note(step)

    def _close_device_record(self) -> None:
        if self._device_record is not None:
            self._device_record.close()
        self._device_record = self._device_taker = None


def _beside(path: Path) -> Path:
    """The record of what is on the device."""
    return path.with_name(f"{path.name}.device")
