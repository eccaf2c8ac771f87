"""ZeroMQ sockets as the agents of a job have them: bounded, encrypted where the job has keys, and watched.

Also who is at the other end of one: an agent is known by its identity, `key|address`, and says three frames.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator, Sequence

import zmq

from .addresses import format_address, parse_address
from .keys import JobKeys

MAX_FRAME_BYTES = 32 << 20
CONTROL, STORE = b"c", b"s"
_ROOM = 64
"""Messages of one connection that ZeroMQ keeps. What has no room there is counted in bytes (`router.py`)."""
_BACKLOG = 4096
"""Connections that may wait to be accepted: agents of a large job come all at once. The kernel's limit is below it."""
UNKNOWN = "unknown"
FAILED = {
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
}
ENDS = FAILED | {zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED}
_OTHER_SECRET = zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC
_SECRET_ON_ONE_SIDE = zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
WATCHED = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_CONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_FRAMES = 3  # channel, the sender's key, the message
_KEY = re.compile(rb"[0-9a-z-]{1,64}")
_HANDSHAKE_MS = 5000
_ESTABLISHED = 1


def secured_router(context: zmq.Context[zmq.Socket[bytes]], keys: JobKeys | None) -> zmq.Socket[bytes]:
    """A ROUTER with limits on what it takes and keeps. `keys` None: neither encrypted nor authenticated."""
    sock: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
    for option, value in (
        (zmq.MAXMSGSIZE, MAX_FRAME_BYTES),
        (zmq.LINGER, 0),
        (zmq.IPV6, 1),
        (zmq.SNDHWM, _ROOM),
        (zmq.RCVHWM, _ROOM),
        (zmq.BACKLOG, _BACKLOG),
        (zmq.HANDSHAKE_IVL, _HANDSHAKE_MS),
    ):
        sock.setsockopt(option, value)
    if keys is not None:
        sock.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
        sock.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
    return sock


def why_refused(event: int, value: int, *, secret: bool) -> str:
    """What is known of a handshake that has failed. `secret`: whether this agent's job has one."""
    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH or value == _OTHER_SECRET:
        return "wrong or no secret: it has another one"
    if value == _SECRET_ON_ONE_SIDE:
        return "wrong or no secret: it has none" if secret else "it has a secret, and this job has none"
    if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
        return "not of this protocol"
    return "it left before it had said who it is"


def parse_identity(identity: bytes) -> tuple[str, str]:
    """(key, address), or empty for what is not an agent's identity."""
    text = identity.decode("ascii", "replace")
    key, separator, address = text.partition("|")
    if not separator or not _KEY.fullmatch(key.encode()) or parse_address(address)[1] == 0:
        return "", ""
    return key, address


def key_in(frames: Sequence[bytes]) -> str:
    """The sender's key in what an agent says; empty for what is not of this protocol."""
    if len(frames) != _FRAMES or frames[0] not in (CONTROL, STORE) or not _KEY.fullmatch(frames[1]):
        return ""
    return frames[1].decode()


def descriptor_of(frame: zmq.Frame) -> int:
    """The connection that a frame has come from; -1 where ZeroMQ does not say, as for some empty frames."""
    try:
        return int(frame.get(zmq.SRCFD))
    except zmq.ZMQError:
        return -1


def peer_name(descriptor: int) -> str:
    """Where the other end of a connection is; `unknown` if it has gone."""
    try:
        with _borrowed(descriptor) as peer:
            return _name_of(peer)
    except OSError:
        return UNKNOWN


def is_open(descriptor: int, name: str) -> bool:
    """Whether it is a connection with `name` whose other end has not left."""
    try:
        with _borrowed(descriptor) as peer:
            state = peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
            return state == _ESTABLISHED and _name_of(peer) == name
    except OSError:
        return False


def hang_up(descriptor: int, name: str) -> None:
    """Ends the connection whose other end is `name`, which ZeroMQ itself cannot do to one of many.

    ZeroMQ sees the end of the stream. A descriptor that belongs to another connection by now is left alone.
    """
    try:
        with _borrowed(descriptor) as peer:
            if _name_of(peer) == name:
                peer.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it has gone by itself


@contextlib.contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket]:
    """A socket of ZeroMQ's, which is not closed here. Needs no descriptor of its own: there may be none left."""
    peer = socket.socket(fileno=descriptor)
    try:
        yield peer
    finally:
        peer.detach()


def _name_of(peer: socket.socket) -> str:
    name = peer.getpeername()
    return format_address(str(name[0]).removeprefix("::ffff:"), int(name[1]))
