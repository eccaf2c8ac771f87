"""What can go wrong with state."""

from __future__ import annotations


class RestoreError(RuntimeError):
    """State could not be brought where the plan wants it; the sentence says what and why."""


class ChecksumError(RestoreError):
    """A bucket has arrived with other bytes than the source has sent. `source`: the rank that sent it."""

    def __init__(self, source: int, bucket: int) -> None:
        super().__init__(f"bucket {bucket} from rank {source} has a wrong checksum: that state is not used")
        self.source = source
