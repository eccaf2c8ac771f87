"""Which epoch a client's request is of, and its keys there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from .. import requests as rq
from .. import wire
from ..keyspace import Keyspace
from ..namespace import Session
from .parts import keys_of

_MANY, _REMEMBERED = 64, 8
"""Of the last few requests for so many keys it is known: all ranks of a node ask for the same."""
NOWHERE = -1


class Places:
    """`is_shared(epoch)`: whether other nodes own keys of it, too."""

    def __init__(self, keyspace: Keyspace, is_shared: Callable[[int], bool]) -> None:
        self._keyspace = keyspace
        self._is_shared = is_shared
        self._known: OrderedDict[tuple[int, tuple[bytes, ...]], tuple[int, tuple[bytes, ...], int | None]] = (
            OrderedDict()
        )

    def find(self, session: Session, request: rq.Request) -> tuple[int, tuple[bytes, ...]]:
        """The epoch, and the keys. Raises WireError if they are of several epochs that have several stores."""
        keys = keys_of(request)
        if not keys:
            return session.epoch if session.named is None else session.named, ()
        many = len(keys) >= _MANY
        if many and (known := self._known.get((session.epoch, keys))) is not None:
            epoch, keys, named = known
            session.named = session.named if named is None else named
            return epoch, keys
        before, session.named = session.named, None
        places = [self._keyspace.place(session, key) for key in keys]
        named, session.named = session.named, before if session.named is None else session.named
        epoch = places[0][0]
        if any(place[0] != epoch for place in places):
            if any(self._is_shared(place[0]) for place in places):
                raise wire.WireError("one request for keys of two epochs")
            return NOWHERE, ()
        found = tuple(place[1] for place in places)
        if many:
            self._known[session.epoch, keys] = epoch, found, named
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return epoch, found
