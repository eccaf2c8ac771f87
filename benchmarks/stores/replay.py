"""Clients that ask a store what the ranks of a gloo group ask while it comes up, without gloo: `replay.py SOCKET`.

The pattern was read off real ones (`tests/benchmarks/test_bootstrap.py` compares): each rank sets its own key, waits
for the keys of all, and gets them in one request. Latency is added to either direction of clients that are on another
node than their store.
"""

from __future__ import annotations

import asyncio
import struct
import sys
import time
from typing import Any

from meeting import come, raise_limits

VALUE_BYTES = 154
LIMIT_S = 110.0
"""No bootstrap is waited for longer."""
_SET, _WAIT, _MULTI_GET = 1, 6, 10
_HELLO = b"\x00" + struct.pack("<I", 0x3C85F7CE)


def keys_of(prefix: str, world_size: int) -> list[bytes]:
    """Where the ranks of a group say where they listen."""
    return [f"/{prefix}/0//cpu//0/{rank}".encode() for rank in range(world_size)]


def _blob(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


class Rank(asyncio.Protocol):
    """One client. `latency_s`: of its way to the store, and of the way back."""

    def __init__(self, rank: int, latency_s: float) -> None:
        self._rank, self._latency_s = rank, latency_s
        self._transport: Any = None
        self._missing = 0
        self._next: Any = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.write(_HELLO)

    def data_received(self, data: bytes) -> None:
        self._missing -= len(data)
        if self._missing == 0 and self._next is not None:
            self._later(self._next)

    def _later(self, action: Any) -> None:
        if self._latency_s:
            asyncio.get_running_loop().call_later(self._latency_s, action)
        else:
            action()

    def _ask(self, data: tuple[bytes, ...], answer: int, then: Any) -> None:
        def send() -> None:
            self._missing, self._next = answer, then
            self._transport.writelines(data)

        self._later(send)

    def bootstrap(self, keys: list[bytes], listed: bytes) -> asyncio.Future[None]:
        """`listed`: all keys as a request has them."""
        done = asyncio.get_running_loop().create_future()
        value = _blob(self._rank.to_bytes(8, "little") * (VALUE_BYTES // 8 + 1))[: 8 + VALUE_BYTES]
        value = struct.pack("<Q", VALUE_BYTES) + value[8:]
        first = bytes([_SET]) + _blob(keys[self._rank]) + value + bytes([_WAIT])

        def get() -> None:
            self._ask((bytes([_MULTI_GET]), listed), len(keys) * (8 + VALUE_BYTES), lambda: done.set_result(None))

        self._ask((first, listed), 1, get)
        return done

    def close(self) -> None:
        self._transport.close()


class Load:
    """All ranks of a job."""

    def __init__(self) -> None:
        self._ranks: list[Rank] = []

    async def connect(self, places: list[tuple[str, int, float]]) -> None:
        """Of each rank: host, port and latency."""
        loop = asyncio.get_running_loop()
        for rank in self._ranks:
            rank.close()
        self._ranks = []
        for number, (host, port, latency_s) in enumerate(places):
            _, rank = await loop.create_connection(lambda n=number, s=latency_s: Rank(n, s), host, port)
            self._ranks.append(rank)

    async def replay(self, prefix: str) -> float:
        """One bootstrap: how long until the last rank had everything, or `LIMIT_S`; then all connections are closed."""
        keys = keys_of(prefix, len(self._ranks))
        listed = struct.pack("<Q", len(keys)) + b"".join(map(_blob, keys))
        began = time.monotonic()
        try:
            await asyncio.wait_for(asyncio.gather(*(rank.bootstrap(keys, listed) for rank in self._ranks)), LIMIT_S)
        except asyncio.TimeoutError:
            for rank in self._ranks:
                rank.close()
            return LIMIT_S
        return time.monotonic() - began


async def _serve(path: str) -> None:
    desk, load = come(path, "load"), Load()
    while True:
        try:
            name, argument = await asyncio.get_running_loop().run_in_executor(None, desk.recv)
        except EOFError:
            return
        try:
            desk.send(await getattr(load, name)(argument))
        except Exception as error:
            desk.send(RuntimeError(repr(error)))


if __name__ == "__main__":
    raise_limits()
    asyncio.run(_serve(sys.argv[1]))
