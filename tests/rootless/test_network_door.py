"""The store's door for other machines' workers: who comes between two epochs belongs to the next."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hyperpodrun.agent.node.plain_store import PlainStore
from hyperpodrun.rootless import requests as rq
from hyperpodrun.rootless.server import StoreServer
from wire_client import RawClient

OWN, OTHER = 1, 4


class Door:
    """A store on a loop of its own, and the first node's store beside it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.server = StoreServer(log=print)
        self.call(self.server.start)

        def make() -> None:
            find = {OWN: ("127.0.0.1", 1), OTHER: ("10.0.0.9", 17101)}.get
            self.plain = PlainStore(self.server.network_door(), "127.0.0.1", 0, lambda: OWN, find)

        self.call(make)
        self.port = self.plain._sockets[0].getsockname()[1]

    def call(self, action: Any, *arguments: Any) -> Any:
        async def act() -> Any:
            result = action(*arguments)
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(act(), self._loop).result(20)

    def open_epoch(self, epoch: int, first: int) -> None:
        self.call(self.server.advance, epoch)
        self.call(self.plain.epoch_opened, first)

    def value(self, epoch: int, key: bytes) -> bytes | None:
        return self.call(self.server._keyspace.value, epoch, key)

    def close(self) -> None:
        self.call(self.server.close)
        self.plain.close()
        self._loop.call_soon_threadsafe(self._loop.stop)


@pytest.fixture
def door() -> Iterator[Door]:
    made = Door()
    yield made
    made.close()


def test_who_dials_between_two_epochs_belongs_to_the_next(door: Door) -> None:
    door.open_epoch(1, first=OWN)
    with RawClient(door.port) as early:
        early.send(rq.Set(b"k", b"of the first"))
        assert early.in_step()
        door.call(door.plain.epoch_ended)
        with RawClient(door.port) as late:  # it waits in the kernel's queue
            late.send(rq.Set(b"k", b"of the second"))
            door.open_epoch(2, first=OWN)
            assert late.in_step()
            early.send(rq.Set(b"k", b"stale"))
            assert early.in_step()
    assert door.value(2, b"k") == b"of the second"


def test_a_node_that_is_not_the_first_lets_nobody_in_and_names_the_one_that_is(door: Door) -> None:
    door.open_epoch(1, first=OTHER)
    assert door.plain.address == ("10.0.0.9", 17101)
    with RawClient(door.port) as client:
        client.send(rq.Set(b"k", b"too early"))
        assert door.value(1, b"k") is None
        door.open_epoch(2, first=OWN)
        assert client.in_step()
    assert door.value(2, b"k") == b"too early"
    assert door.value(1, b"k") is None
