"""What can go wrong with state."""

from __future__ import annotations


class RestoreError(RuntimeError):
    """State could not be brought where the plan wants it; the sentence says what and why."""


class ChecksumError(RestoreError):
    """A bucket has arrived with other bytes than the source has sent. `source`: the rank that sent it."""

    def __init__(self, source: int, bucket: int) -> None:
        super().__init__(f"bucket {bucket} from rank {source} has a wrong checksum: that state is not used")
        self.source = source


class LocalStateLost(RestoreError):
    """What only this rank knew of a step is nowhere: the step must be another one. `step`: the one that cannot be."""

    def __init__(self, sentence: str, step: int) -> None:
        super().__init__(sentence)
        self.step = step


class UnsupportedStateError(TypeError):
    """What training does cannot be carried over a fault. The sentence names the object and the remedy.

    It ends the job at once, with exit code 93: no restart would change it.
    """

    ends_job = True
