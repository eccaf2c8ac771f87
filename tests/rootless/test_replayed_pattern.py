"""What the benchmark of bootstraps replays is what the ranks of a real group ask."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
from hyperpodrun.rootless import requests as rq
from hyperpodrun.rootless.keyspace import Keyspace
from hyperpodrun.rootless.server import StoreServer
from rank_process import RankProcess

STORES = Path(__file__).resolve().parents[2] / "benchmarks" / "stores"
STORE_AND_GROUP = """
    os.environ.update(GLOO_ENABLE_STORE_V2_API="1", GLOO_ENABLE_RANK_AS_SEQUENCE_NUMBER="1")
    store = PrefixStore("hyperpodrun-epoch-0", connect(port))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=seconds(20))
    dist.destroy_process_group()
"""


def asked_by(sessions: dict[int, list[rq.Request]]) -> list[list[Any]]:
    """By session: what was asked, values by their size only."""
    found = []
    for requests in sessions.values():
        shapes: list[Any] = []
        for request in requests:
            match request:
                case rq.Set(key, value):
                    shapes.append(("set", key, len(value)))
                case rq.Wait(keys) | rq.MultiGet(keys):
                    shapes.append((type(request).__name__, keys))
        found.append(shapes)
    return sorted(found, key=lambda shapes: shapes[0][1])


def without_sizes(shapes: list[Any]) -> str:
    return repr([shape[:2] for shape in shapes]).replace("epoch-1", "epoch-0")


def test_a_rank_sets_its_key_and_waits_for_and_gets_all(
    ranks: tuple[RankProcess, RankProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(STORES))
    from replay import VALUE_BYTES, Rank, keys_of

    seen: dict[int, list[rq.Request]] = {}
    apply = Keyspace.apply

    def record(self: Keyspace, session: Any, request: rq.Request, now_ns: int) -> Any:
        seen.setdefault(id(session), []).append(request)
        return apply(self, session, request, now_ns)

    monkeypatch.setattr(Keyspace, "apply", record)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def call(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(20)

    server = StoreServer(log=print)
    port = call(server.start())
    for number, rank in enumerate(ranks):
        rank.start(STORE_AND_GROUP, port=port, rank=number)
    assert [rank.result() for rank in ranks] == [None, None]
    real = asked_by(seen)
    seen.clear()

    async def replay() -> None:
        server.advance(1)  # the real ranks' keys are gone
        keys = keys_of("hyperpodrun-epoch-1", 2)
        listed = struct.pack("<Q", 2) + b"".join(struct.pack("<Q", len(key)) + key for key in keys)
        clients = [(await loop.create_connection(lambda n=n: Rank(n, 0.0), "127.0.0.1", port))[1] for n in range(2)]
        await asyncio.gather(*(client.bootstrap(keys, listed) for client in clients))
        for client in clients:
            client.close()

    call(replay())
    replayed = asked_by(seen)
    call(server.close())
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    assert [without_sizes(shapes) for shapes in real] == [without_sizes(shapes) for shapes in replayed]
    (size,) = {shape[2] for shapes in real for shape in shapes if shape[0] == "set"}
    assert size - len(socket.gethostname()) == VALUE_BYTES - 2, "a rank says the name of its host"
