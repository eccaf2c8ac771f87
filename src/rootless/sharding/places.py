"""Which epoch a client's request is of, and its keys there."""

from __future__ import annotations

from collections.abc import Callable

from .. import requests as rq
from .. import wire
from ..keyspace import Keyspace
from ..namespace import Session
from .parts import keys_of

NOWHERE = -1


class Places:
    """`is_shared(epoch)`: whether other nodes own keys of it, too."""

    def __init__(self, keyspace: Keyspace, is_shared: Callable[[int], bool]) -> None:
        self._keyspace = keyspace
        self._is_shared = is_shared

    def find(self, session: Session, request: rq.Request) -> tuple[int, tuple[bytes, ...]]:
        """The epoch, and the keys. Raises WireError if they are of several epochs that have several stores."""
        keys = keys_of(request)
        if not keys:
            return session.epoch if session.named is None else session.named, ()
        placed = self._keyspace.places(session, keys)
        if placed.epoch is not None:
            return placed.epoch, placed.keys
        if any(self._is_shared(epoch) for epoch, _ in placed.places):
            raise wire.WireError("one request for keys of two epochs")
        return NOWHERE, ()
