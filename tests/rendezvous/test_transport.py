"""The connections between agents: who is let in, who is told that somebody is gone, and what garbage does."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import zmq
from hyperpodrun.control.membership import messages as msg
from hyperpodrun.protocol.messages import MessageError
from hyperpodrun.rendezvous.keys import derive_keys
from hyperpodrun.rendezvous.sockets import CONTROL
from hyperpodrun.rendezvous.transport import Transport
from hyperpodrun.rootless import shard_messages

KEYS = derive_keys(b"a secret that is long enough", "job")
OTHER_KEYS = derive_keys(b"another secret, as long as it", "job")


class End:
    """One agent's end: what it has heard, who has left, what it has logged."""

    def __init__(self, key: str, keys: Any = KEYS) -> None:
        self.heard: list[tuple[str, bytes]] = []
        self.closed: list[tuple[str, str]] = []
        self.logged: list[tuple[str, dict[str, object]]] = []
        self.transport = Transport(key, keys, lambda event, **fields: self.logged.append((event, fields)))
        self.port = self.transport.bind("127.0.0.1", 17300, 200)
        self.address = f"127.0.0.1:{self.port}"

    def start(self) -> None:
        self.transport.start(self.address, self._hear, lambda address, key: self.closed.append((address, key)))

    def _hear(self, key: str, address: str, channel: bytes, data: bytes) -> None:
        self.heard.append((key, data))

    def say(self, other: End, data: bytes) -> None:
        self.transport.send(other.address, CONTROL, data)


async def until(condition: Callable[[], object], limit: float = 10.0) -> None:
    async def watch() -> None:
        while not condition():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(watch(), limit)


def play(scene: Callable[..., Awaitable[None]], *ends: End) -> None:
    async def run() -> None:
        for end in ends:
            end.start()
        await scene(*ends)

    try:
        asyncio.run(run())
    finally:
        for end in ends:
            end.transport.close(0)


@pytest.mark.parametrize("keys", [KEYS, None], ids=["encrypted", "insecure"])
def test_messages_go_both_ways_over_one_connection(keys: Any) -> None:
    async def scene(one: End, other: End) -> None:
        one.say(other, b"hello")
        await until(lambda: other.heard == [("one", b"hello")])
        other.say(one, b"you too")
        await until(lambda: one.heard == [("other", b"you too")])
        assert not len(other.transport.outgoing), "the connection that is there is used"

    play(scene, End("one", keys), End("other", keys))


def test_an_end_that_closes_is_told_at_once() -> None:
    async def scene(one: End, other: End) -> None:
        one.say(other, b"hello")
        await until(lambda: other.heard)
        one.transport.close(0)
        await until(lambda: other.closed == [(one.address, "one")], limit=2)

    play(scene, End("one"), End("other"))


def test_nobody_at_an_address_is_told_at_once() -> None:
    async def scene(one: End) -> None:
        one.transport.send("127.0.0.1:17299", CONTROL, b"hello")
        await until(lambda: one.closed == [("127.0.0.1:17299", "")], limit=2)

    play(scene, End("one"))


@pytest.mark.parametrize(
    ("own", "keys", "reason"),
    [
        (KEYS, OTHER_KEYS, "wrong or no secret: it has another one"),
        (KEYS, None, "wrong or no secret: it has none"),
        (None, KEYS, "it has a secret, and this job has none"),
    ],
    ids=["wrong secret", "no secret", "not wanted"],
)
def test_who_has_another_secret_is_refused_with_one_line(own: Any, keys: Any, reason: str) -> None:
    async def scene(one: End, stranger: End, friend: End) -> None:
        for _ in range(3):
            stranger.say(one, b"let me in")
            await until(lambda: stranger.closed, limit=10)
            stranger.closed.clear()
        friend.say(one, b"hello")
        await until(lambda: one.heard)
        await until(lambda: one.logged)
        assert one.heard == [("friend", b"hello")]
        ((event, fields),) = one.logged
        assert event == "peer-refused"
        # Where only one side has a secret both see it: who hangs up first leaves the other with less to say.
        assert fields["reason"] in (reason, *(["it left before it had said who it is"] if None in (own, keys) else []))
        assert len(stranger.logged) == 1

    play(scene, End("one", own), End("stranger", keys), End("friend", own))


def test_a_replayed_connection_says_nothing() -> None:
    """All bytes of one connection again, on another: CURVE's session keys are not the same any more."""

    async def scene(one: End, other: End) -> None:
        recorded = bytearray()
        relays: list[asyncio.Task[None]] = []

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            to_reader, to_writer = await asyncio.open_connection("127.0.0.1", one.port)

            async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter, keep: bytearray | None) -> None:
                while data := await source.read(65536):
                    if keep is not None:
                        keep += data
                    target.write(data)
                    await target.drain()

            relays.append(asyncio.create_task(copy(reader, to_writer, recorded)))
            relays.append(asyncio.create_task(copy(to_reader, writer, None)))

        server = await asyncio.start_server(relay, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        other.transport.send(f"127.0.0.1:{port}", CONTROL, b"once")
        await until(lambda: one.heard == [("other", b"once")])
        reader, writer = await asyncio.open_connection("127.0.0.1", one.port)
        writer.write(bytes(recorded))
        await writer.drain()

        async def read_to_the_end() -> None:
            while await reader.read(65536):
                pass

        await asyncio.wait_for(read_to_the_end(), 15)
        assert one.heard == [("other", b"once")]
        writer.close()
        server.close()
        for task in relays:
            task.cancel()

    play(scene, End("one"), End("other"))


def test_garbage_on_the_port_disturbs_nobody() -> None:
    dice = random.Random(7)

    async def scene(one: End, friend: End) -> None:
        friend.say(one, b"before")
        for number in range(60):
            _, writer = await asyncio.open_connection("127.0.0.1", one.port)
            greeting = b"\xff\0\0\0\0\0\0\0\1\x7f\3\0CURVE".ljust(64, b"\0") if number % 2 else b""
            with_length = b"\4" + struct.pack(">B", dice.randrange(256))
            writer.write(greeting + with_length + dice.randbytes(dice.randrange(400)))
            with contextlib.suppress(ConnectionError):  # it has closed already
                await writer.drain()
            writer.close()
        friend.say(one, b"after")
        await until(lambda: one.heard == [("friend", b"before"), ("friend", b"after")])
        assert [event for event, _ in one.logged] == ["peer-refused"]
        assert "secret" not in str(one.logged), "nobody knows that it is about one"
        assert one.closed == []

    play(scene, End("one"), End("friend"))


def test_connections_that_say_nothing_are_bounded_and_an_agent_still_gets_in() -> None:
    async def scene(one: End, friend: End) -> None:
        held = [await asyncio.open_connection("127.0.0.1", one.port) for _ in range(80)]
        await until(lambda: one.transport.counters["too_many"] >= 16)
        ended = [asyncio.ensure_future(reader.read()) for reader, _ in held]  # until its end
        await until(lambda: sum(task.done() for task in ended) >= 16)
        friend.say(one, b"a word")
        await until(lambda: len(one.closed) + len(one.heard) or friend.closed)
        for task, (_, writer) in zip(ended, held, strict=True):
            writer.close()
            task.cancel()
        await until(lambda: not len(one.transport.incoming))
        friend.say(one, b"another")
        await until(lambda: (b"another") in [data for _, data in one.heard])
        assert [event for event, _ in one.logged] == ["peer-refused"]

    play(scene, End("one"), End("friend"))


def test_frames_that_are_not_of_the_protocol_are_refused_with_one_line() -> None:
    async def scene(one: End) -> None:
        context = zmq.Context()
        identities = [b"nobody", b"key|nowhere", b"UPPER|127.0.0.1:1", b"fine|127.0.0.1:1", b"\xff\xfe|h:1"]
        for identity in identities:
            dealer = context.socket(zmq.DEALER)
            dealer.setsockopt(zmq.IDENTITY, identity)
            dealer.setsockopt(zmq.LINGER, 200)
            dealer.setsockopt(zmq.RECONNECT_IVL, -1)  # one that goes while it connects again is told of, too
            dealer.connect(f"tcp://{one.address}")
            for frames in ([b"c", b"fine"], [b"x", b"fine", b"data"], [b"c", b"another", b"data"], [b""] * 5):
                dealer.send_multipart(frames)
            dealer.close()
        await until(lambda: one.transport.counters["malformed"] == len(identities))
        assert one.heard == []
        assert [event for event, _ in one.logged] == ["bad-message"], "one line a minute, however many there are"
        context.destroy(0)

    play(scene, End("one", None))


def test_every_kind_of_message_survives_mutation() -> None:
    """Bytes that were changed on the way are a message or a MessageError, never anything else."""
    dice = random.Random(3)
    samples = [
        msg.encode(msg.Join("job", "key", "host", "host:1", 2)),
        msg.encode(msg.RequestVote(3, (2, 1), pre=False)),
        msg.encode(msg.Heartbeat(1, 0, 2, 3)),
        msg.encode(msg.Tell(1, 0, 1, 0, msg.Report((1, 1)))),
        shard_messages.encode(shard_messages.Batch(1, 1, 0, (shard_messages.Answer(4, b"reply", (b"value", None)),))),
    ]
    for _ in range(4000):
        data = bytearray(dice.choice(samples))
        for _ in range(dice.randrange(1, 4)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        for decode in (msg.decode, shard_messages.decode):
            with contextlib.suppress(MessageError):
                decode(bytes(data[: dice.randrange(len(data) + 1)]))


def test_a_port_range_that_is_full_is_told(free_port: Callable[[], int]) -> None:
    port = free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        transport = Transport("one", KEYS, lambda *_, **__: None)
        with pytest.raises(OSError, match="HPCT_PORT_BASE"):
            transport.bind("127.0.0.1", port, 1)
        transport.close(0)


def test_what_became_of_attempts_is_known_until_somebody_answers() -> None:
    async def scene(first: End, second: End) -> None:
        nobody = f"127.0.0.1:{first.port + 30_000}"
        first.transport.send(nobody, CONTROL, b"x")
        first.transport.send("localhost:1", CONTROL, b"x")
        first.say(second, b"question")
        await until(lambda: second.heard and len(first.closed) == 2)
        second.say(first, b"answer")
        await until(lambda: first.heard)
        local = first.transport.tried["localhost:1"]
        assert local in ("127.0.0.1:1 does not answer", "[::1]:1 does not answer")
        assert first.transport.tried == {nobody: "does not answer", "localhost:1": local}

    play(scene, End("a"), End("b"))
