"""The client's side of the TCPStore protocol, for tests that need bytes a torch client would not send."""

from __future__ import annotations

import socket
import struct

from hyperpodrun.rootless import requests as rq
from hyperpodrun.rootless.wire import VALIDATION_MAGIC, QueryType

_CODES = {
    rq.Validate: QueryType.VALIDATE,
    rq.Set: QueryType.SET,
    rq.CompareSet: QueryType.COMPARE_SET,
    rq.Get: QueryType.GET,
    rq.Add: QueryType.ADD,
    rq.Check: QueryType.CHECK,
    rq.Wait: QueryType.WAIT,
    rq.NumKeys: QueryType.GETNUMKEYS,
    rq.DeleteKey: QueryType.DELETE_KEY,
    rq.Append: QueryType.APPEND,
    rq.MultiGet: QueryType.MULTI_GET,
    rq.MultiSet: QueryType.MULTI_SET,
    rq.CancelWait: QueryType.CANCEL_WAIT,
    rq.Ping: QueryType.PING,
    rq.QueuePush: QueryType.QUEUE_PUSH,
    rq.QueuePop: QueryType.QUEUE_POP,
    rq.QueueLen: QueryType.QUEUE_LEN,
    rq.ListKeys: QueryType.LIST_KEYS,
    rq.Barrier: QueryType.BARRIER,
}


def blob(data: bytes) -> bytes:
    """A key or value."""
    return struct.pack("<Q", len(data)) + data


def encode(request: rq.Request) -> bytes:
    """A request as torch's client sends it."""
    head = bytes([_CODES[type(request)]])
    match request:
        case rq.Validate():
            return head + struct.pack("<I", VALIDATION_MAGIC)
        case rq.Ping(nonce):
            return head + struct.pack("<I", nonce)
        case rq.Set(key, value) | rq.Append(key, value) | rq.QueuePush(key, value):
            return head + blob(key) + blob(value)
        case rq.CompareSet(key, expected, desired):
            return head + blob(key) + blob(expected) + blob(desired)
        case rq.Get(key) | rq.DeleteKey(key) | rq.QueuePop(key) | rq.QueueLen(key):
            return head + blob(key)
        case rq.Add(key, number) | rq.Barrier(key, number):
            return head + blob(key) + struct.pack("<q", number)
        case rq.Check(keys) | rq.Wait(keys) | rq.MultiGet(keys):
            return head + struct.pack("<Q", len(keys)) + b"".join(map(blob, keys))
        case rq.MultiSet(items):
            pairs = (blob(key) + blob(value) for key, value in items)
            return head + struct.pack("<Q", len(items)) + b"".join(pairs)
        case rq.NumKeys() | rq.CancelWait() | rq.ListKeys():
            return head


class RawClient:
    """A connection that sends whatever it is told to."""

    def __init__(self, port: int, *, validate: bool = True, host: str = "127.0.0.1") -> None:
        self.socket = socket.create_connection((host, port), timeout=20)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if validate:
            self.send(rq.Validate())

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *requests: rq.Request) -> None:
        """Send requests."""
        self.socket.sendall(b"".join(map(encode, requests)))

    def read(self, count: int) -> bytes:
        """Exactly so many bytes of the answer."""
        data = bytearray()
        while len(data) < count:
            chunk = self.socket.recv(min(count - len(data), 1 << 20))
            assert chunk, f"the store closed the connection after {bytes(data)!r}"
            data += chunk
        return bytes(data)

    def in_step(self, nonce: int = 77) -> bool:
        """Is the next answer the one to a PING sent now?"""
        self.send(rq.Ping(nonce))
        return self.read(4) == struct.pack("<I", nonce)

    def closed(self) -> bool:
        """True when the store has closed this connection; waits for it."""
        try:
            while self.socket.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass
        return True
