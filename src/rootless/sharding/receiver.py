"""Who gets the answers of a session of the keyspace."""

from __future__ import annotations

from typing import Protocol


class Receiver(Protocol):
    """A client's connection, another node's ask, or a crowd of nodes."""

    def send(self, reply: list[bytes]) -> None: ...

    def refuse(self, reason: str) -> None:
        """Its request cannot be carried out: nothing more is answered."""

    def abort(self) -> None: ...
