"""What the agent, the standby source and the workers forked from it say to each other.

One packet is one message. Descriptors travel beside it (SCM_RIGHTS), in the order that each message names.
"""

from __future__ import annotations

import msgspec

from .messages import MessageError

MAX_PACKET_BYTES = 4096
MAX_ENVIRONMENT_BYTES = 1 << 23
OPTIONS = "HYPERPODRUN_STANDBY_OPTIONS"
"""In the source's first environment only: `SourceOptions` as JSON."""
ROOM = "HYPERPODRUN_STANDBY_ROOM"
"""Likewise: padding, so that the environment of a worker, as /proc shows it, fits where the source's was."""

CORE, EVERYTHING = 1, 2
"""What must be imported before a worker is forked: torch; also what optimizers, DDP and --preload pull in."""


class SourceOptions(msgspec.Struct, frozen=True):
    """How a source is started."""

    control: int
    """The descriptor of its end of the control socket."""
    agent: int
    """The pid of the agent."""
    python_path: str | None
    """PYTHONPATH as the workers have it."""
    needs: int = EVERYTHING
    """What the workers' script needs imported, as far as its text tells."""
    preload: tuple[str, ...] = ()
    inprocess: bool = False
    """Workers restart in process: what that needs of this package is imported, too."""
    compiler: bool = False
    """Workers compile: torch.compile's backend is imported, too."""


class Fork(msgspec.Struct, frozen=True, tag="fork"):
    """Agent to source. Beside it: the environment (a file, as /proc has it), the worker's line, stdout, stderr."""

    needs: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Source to agent: what workers need is imported."""

    busy: bool = False
    """For a while it imports what saves respawned workers time, and serves nobody until it is `Ready` once more."""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Source to agent: it cannot be one, and a new one could not either."""

    reason: str


class Spoiled(msgspec.Struct, frozen=True, tag="spoiled"):
    """Source to agent: by importing torch.compile's backend. A new one without that can serve."""

    reason: str


class Forked(msgspec.Struct, frozen=True, tag="forked"):
    """Worker to agent, on its line; beside it its pidfd. It then waits for one byte; the line's end means: go away."""

    pid: int


FromSource = Ready | Refused | Spoiled
_from_source: msgspec.msgpack.Decoder[FromSource] = msgspec.msgpack.Decoder(FromSource)
_to_source = msgspec.msgpack.Decoder(Fork)
_from_worker = msgspec.msgpack.Decoder(Forked)
encode = msgspec.msgpack.encode


def decode_from_source(data: bytes) -> FromSource:
    """Raises MessageError."""
    try:
        return _from_source.decode(data)
    except msgspec.MsgspecError as error:
        raise MessageError(str(error)) from None


def decode_to_source(data: bytes) -> Fork:
    """Raises MessageError."""
    try:
        return _to_source.decode(data)
    except msgspec.MsgspecError as error:
        raise MessageError(str(error)) from None


def decode_from_worker(data: bytes) -> Forked:
    """Raises MessageError."""
    try:
        return _from_worker.decode(data)
    except msgspec.MsgspecError as error:
        raise MessageError(str(error)) from None


def pack_environment(environment: dict[str, str]) -> bytes:
    """As execve and /proc have it."""
    import os

    return b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in environment.items())


def unpack_environment(data: bytes) -> list[tuple[bytes, bytes]]:
    """The names and values of `pack_environment`."""
    pairs = (entry.partition(b"=") for entry in data.split(b"\0") if entry)
    return [(name, value) for name, _, value in pairs]
