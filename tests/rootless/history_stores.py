"""The stores of several nodes in a process of their own, for histories: joined as agents join them, or wrongly.

Run as a script with a JSON object: `nodes`, and `broken`, the name of a mistake to make on purpose. Prints the ports,
and ends with its standard input. Messages between the stores are encoded, and each takes up to `delay_ms`.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

MISTAKES = ("lost", "early", "twice")
"""A write that is lost on its way; a check that is answered from memory; an addition that is carried out twice."""


class HistoryStores:
    """The tests' handle: `ports` of the nodes."""

    def __init__(self, nodes: int, broken: str = "", delay_ms: float = 0.5) -> None:
        options = {"nodes": nodes, "broken": broken, "delay_ms": delay_ms}
        command = [sys.executable, __file__, json.dumps(options)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.ports: list[int] = json.loads(self._process.stdout.readline())

    def __enter__(self) -> Sequence[int]:
        return self.ports

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=20)
        self._process.stdout.close()
        assert self._process.returncode == 0


def _break(keyspace: Any, mistake: str) -> None:
    """Makes a store err now and then."""
    from hyperpodrun.rootless import requests as rq
    from hyperpodrun.rootless import wire

    dice, handlers = random.Random(3), keyspace._handlers
    set_, check, add = handlers[rq.Set], handlers[rq.Check], handlers[rq.Add]
    remembered: dict[tuple[bytes, ...], list[bytes]] = {}

    def lose(session: Any, request: rq.Set) -> Any:
        return () if b"own" not in request.key and dice.random() < 0.2 else set_(session, request)

    def remember(session: Any, request: rq.Check) -> Any:
        ((_, answer),) = check(session, request)
        old = remembered.setdefault(request.keys, [wire.NOT_READY])
        return [(session, old if dice.random() < 0.3 else answer)]

    def add_twice(session: Any, request: rq.Add) -> Any:
        if dice.random() < 0.2:
            add(session, request)
        return add(session, request)

    broken: dict[str, tuple[type, Any]] = {
        "lost": (rq.Set, lose),
        "early": (rq.Check, remember),
        "twice": (rq.Add, add_twice),
    }
    kind, handler = broken[mistake]
    handlers[kind] = handler


async def _serve(nodes: int, broken: str, delay_ms: float) -> None:
    from hyperpodrun.rootless import shard_messages
    from hyperpodrun.rootless.server import StoreServer
    from hyperpodrun.rootless.shard_messages import StoreMessage
    from hyperpodrun.rootless.shards import Shards

    loop, dice = asyncio.get_running_loop(), random.Random(7)
    servers = [StoreServer(log=lambda line: print(line, file=sys.stderr)) for _ in range(nodes)]
    sharings: list[Shards] = []
    links: dict[tuple[int, int], float] = {}
    """When the last message of a link arrives: one connection keeps its order."""

    def send(node: int, other: int, message: StoreMessage) -> None:
        at = max(links.get((node, other), 0.0), loop.time() + dice.random() * delay_ms / 1000)
        links[node, other] = at
        loop.call_at(at, deliver, node, other, shard_messages.encode(message))

    def deliver(node: int, other: int, data: bytes) -> None:
        sharings[other].receive(node, f"agent-{node}", shard_messages.decode(data), 1)

    ports = [await server.start() for server in servers]
    for number, server in enumerate(servers):
        sharings.append(
            server.share(lambda other, message, own=number: send(own, other, message), lambda own=number: own)
        )
        if broken:
            _break(server._keyspace, broken)
    for server, sharing in zip(servers, sharings, strict=True):
        server.advance(0)
        sharing.open(0, range(nodes))
    print(json.dumps(ports), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    for server in servers:
        await server.close()


if __name__ == "__main__":
    asyncio.run(_serve(**json.loads(sys.argv[1])))
