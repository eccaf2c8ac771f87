"""The stores of some nodes, each in a process of its own that is like an agent: the store, its shards, the transport.

    agents.py SOCKET HOST LATENCY_MS NUMBER...     what is in `meeting.py` is spoken over the socket

Latency is added to what other agents send: every message is dealt with so much later.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

from hyperpodrun.rendezvous.addresses import format_address
from hyperpodrun.rendezvous.sockets import STORE
from hyperpodrun.rendezvous.transport import Transport
from hyperpodrun.rootless import shard_messages
from hyperpodrun.rootless.server import StoreServer
from meeting import come, raise_limits, spent_s, transferred

_FIRST_PORT, _PORTS = 23000, 512


class Agent:
    """One of them."""

    def __init__(self, path: str, host: str, latency_s: float, number: int) -> None:
        self._host, self._latency_s, self._number = host, latency_s, number
        self._desk = come(path, "agent", number)
        self._store = StoreServer(host="127.0.0.1", log=_complain)
        self._transport = Transport(os.urandom(6).hex(), None, lambda *said, **more: None)
        self._addresses: dict[int, str] = {}
        self._numbers: dict[str, int] = {}
        self._messages = 0
        self._ended = asyncio.Event()

    async def serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        port = self._transport.bind(self._host, _FIRST_PORT, _PORTS)
        address = format_address(self._host, port)
        store_port = await self._store.start()
        self._transport.start(address, self._on_message, lambda *_: None)
        self._sharing = self._store.share(self._send, lambda: self._number)
        self._desk.send((address, store_port))
        self._loop.add_reader(self._desk.fileno(), self._hear)
        await self._ended.wait()
        self._transport.close(0.1)
        await self._store.close()

    def _send(self, node: int, message: Any) -> None:
        self._transport.send(self._addresses[node], STORE, shard_messages.encode(message))

    def _on_message(self, key: str, address: str, channel: bytes, data: bytes) -> None:
        self._messages += 1
        if self._latency_s:
            self._loop.call_later(self._latency_s, self._receive, key, address, data)
        else:
            self._receive(key, address, data)

    def _receive(self, key: str, address: str, data: bytes) -> None:
        self._sharing.receive(self._numbers[address], key, shard_messages.decode(data), time.monotonic_ns())

    def _hear(self) -> None:
        try:
            name, *arguments = self._desk.recv()
        except EOFError:
            self._ended.set()
            self._loop.remove_reader(self._desk.fileno())
            return
        try:
            self._desk.send(getattr(self, f"on_{name}")(*arguments))
        except Exception as error:
            self._desk.send(error)

    def on_peers(self, addresses: dict[int, str]) -> None:
        self._addresses = addresses
        self._numbers = {address: number for number, address in addresses.items()}

    def on_open(self, epoch: int) -> None:
        self._store.advance(epoch)
        self._sharing.open(epoch, sorted(self._addresses))

    def on_counters(self) -> tuple[int, int, float]:
        """Requests and messages that came, bytes in both directions, processor time."""
        return self._store.counters.requests + self._messages, transferred(), spent_s()


def _complain(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def _be(*arguments: Any) -> None:
    await Agent(*arguments).serve()


def main() -> None:
    path, host, latency_ms, *numbers = sys.argv[1:]
    raise_limits()
    children = []
    for number in map(int, numbers):
        child = os.fork()
        if not child:
            asyncio.run(_be(path, host, float(latency_ms) / 1000, number))
            sys.stdout.flush()
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
