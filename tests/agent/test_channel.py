"""The agent's socket: what is not a message gets one log line and is not listened to again; the rest goes on."""

from __future__ import annotations

import asyncio

import zmq
from hyperpodrun.agent.node.channel import WorkerChannel
from hyperpodrun.protocol import messages


class Console:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, event: str, **fields: object) -> None:
        self.lines.append(event)


def exchange(tmp_path, conversation):
    """Runs `conversation(connect, channel, received, console)` against a live channel."""

    async def main():
        endpoint = f"ipc://{tmp_path}/agent.sock"
        received: asyncio.Queue = asyncio.Queue()
        console = Console()
        channel = WorkerChannel(endpoint, console, lambda *message: received.put_nowait(message))
        context = zmq.Context()

        def connect(identity: bytes) -> zmq.Socket:
            socket = context.socket(zmq.DEALER)
            socket.setsockopt(zmq.IDENTITY, identity)
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(endpoint)
            return socket

        try:
            await asyncio.wait_for(conversation(connect, channel, received, console), 30)
        finally:
            channel.close()
            context.destroy(linger=0)

    asyncio.run(main())


GOOD = messages.encode(messages.Completed(3))


def test_a_worker_is_heard_and_answered(tmp_path):
    async def conversation(connect, channel, received, console):
        worker = connect(b"2.7")
        worker.send(GOOD)
        assert await received.get() == (2, 7, messages.Completed(3))
        channel.send(2, 7, messages.Finish(3))
        while not worker.poll(0):
            await asyncio.sleep(0.001)
        assert messages.decode_from_agent(worker.recv()) == messages.Finish(3)

    exchange(tmp_path, conversation)


def test_bad_bytes_cost_one_line_and_the_peer_its_voice(tmp_path):
    async def conversation(connect, channel, received, console):
        bad, good = connect(b"0.1"), connect(b"1.2")
        for junk in (b"", b"\xc1\xc1", b"x" * 1000, messages.encode(messages.Finish(3))):
            bad.send(junk)
        bad.send(GOOD)
        while channel.counters["malformed"] + channel.counters["refused"] < 5:
            await asyncio.sleep(0.001)
        assert console.lines == ["bad-message"]
        assert received.empty()
        good.send(GOOD)
        assert await received.get() == (1, 2, messages.Completed(3))

    exchange(tmp_path, conversation)


def test_strange_identities_and_too_many_frames_are_refused(tmp_path):
    async def conversation(connect, channel, received, console):
        stranger, babbler = connect(b"who?"), connect(b"1.5")
        stranger.send(GOOD)
        babbler.send_multipart([GOOD, GOOD])
        while channel.counters["malformed"] < 2:
            await asyncio.sleep(0.001)
        assert received.empty()
        assert console.lines == ["bad-message"], "one line a minute, however many there are"

    exchange(tmp_path, conversation)


def test_a_message_larger_than_the_limit_closes_its_connection_only(tmp_path):
    async def conversation(connect, channel, received, console):
        connect(b"0.1").send(b"x" * (messages.MAX_MESSAGE_BYTES + 1))
        good = connect(b"1.2")
        good.send(GOOD)
        assert (await received.get())[:2] == (1, 2)

    exchange(tmp_path, conversation)


def test_sending_to_a_worker_that_is_gone_is_counted_and_no_error(tmp_path):
    async def conversation(connect, channel, received, console):
        channel.send(9, 9, messages.Finish(1))
        assert channel.counters["undelivered"] == 1

    exchange(tmp_path, conversation)
