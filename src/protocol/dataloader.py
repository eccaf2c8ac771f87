"""What the readers of a data stream, its producer and its fetchers say to each other.

Messages travel over unix SOCK_SEQPACKET sockets, one message a packet, so an interrupted reader never leaves half of
one behind. A reader's first message, `Open`, goes to the host with a descriptor of the recipe (`dataloader/recipe.py`)
and is handed on to the producer together with the connection itself.

A batch's place is (epoch, index): the index-th batch, from 0, of the epoch-th pass over the data. `Seek` starts a
conversation anew: its `serial` comes back in `Sought`, and `Window` messages sent before that are void.
"""

from __future__ import annotations

from typing import TypeAlias, TypeVar

import msgspec

from .messages import MessageError

VERSION = 1
MAX_PACKET_BYTES = 160 << 10
MAX_RECIPE_BYTES = 1 << 30
MAX_TEXT = 48 << 10

Position: TypeAlias = tuple[int, int]
"""(epoch, index of the batch in the epoch), both from 0."""


class _Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    pass


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a producer must know of the configuration (`dataloader/config.py` says what it means)."""

    cache_dir: str
    prefetch: int
    lookback: int
    checkpoint_frequency: int | None
    encrypt: bool
    max_skip_batches: int


# ---- reader to producer ----------------------------------------------------------------------------------------


class Open(_Message, frozen=True):
    """A reader wants a stream. `digest` tells recipes apart, `content` what the objects in them hold.

    A stream keeps its first seed, unless `insist`: then it is made anew with this one. Ranks that share a stream may
    hold objects that differ a little (their own rank, say); with `renew` the process says that it has read the stream
    with other content before: then it is made anew, unless somebody has opened it with this content, too.
    """

    version: int
    stream: str
    options: StreamOptions
    digest: str
    content: str
    seed: int
    insist: bool
    renew: bool


class Seek(_Message, frozen=True):
    """The next batch I read is this. `epoch` None: `index` counts the batches of all epochs.

    With `has_state` a descriptor comes along: the source's own state at this position, as a batch file.
    """

    serial: int
    epoch: int | None
    index: int
    has_state: bool = False


class Took(_Message, frozen=True):
    """The next batch I read is this one: those before it I no longer need."""

    epoch: int
    index: int


class Pause(_Message, frozen=True):
    """I read no more for now: do not wait for me."""


class Again(_Message, frozen=True):
    """The file of this batch is of no use; make it once more."""

    serial: int
    epoch: int
    index: int
    reason: str


# ---- producer to reader ----------------------------------------------------------------------------------------


class Opened(_Message, frozen=True):
    """The stream exists; `pid` is its producer's. `length`: batches per epoch, if the loader knows.

    `loaders` is not 0 when the factory gives a list of so many; each must then have a stream of its own.
    """

    pid: int
    directory: str
    mark: str
    seed: int
    length: int | None
    pin_memory: bool
    loaders: int
    key: bytes


class Sought(_Message, frozen=True):
    """The answer to Seek and Again: where the reader is."""

    serial: int
    epoch: int
    index: int


class Window(_Message, frozen=True):
    """Every batch from the reader's position up to, not including, this one lies ready."""

    epoch: int
    index: int


class Ended(_Message, frozen=True):
    """The epoch has `length` batches."""

    epoch: int
    length: int


class Failed(_Message, frozen=True):
    """This batch could not be made. `type_name` is that of a dataset's error.

    `kind`: "dataset" (the user's code raised), "batch" (it holds what cannot be in one), "full" (no room), "killed"
    (whoever makes it dies), "corrupt" (its file is never what was written), "skip" (max_skip_batches).
    """

    epoch: int
    index: int
    kind: str
    type_name: str
    text: str


class Skipped(_Message, frozen=True):
    """To reach a position, `batches` were passed over in `seconds`; `how` says what that took."""

    batches: int
    seconds: float
    how: str


class Refused(_Message, frozen=True):
    """There will be no batches on this connection. `kind`: "factory" (the user's code raised), "taken", "start"."""

    kind: str
    type_name: str
    text: str


# ---- producer to fetcher, and back -----------------------------------------------------------------------------


class Fetch(_Message, frozen=True):
    """Make this batch. `indices` of the dataset as `sources/` packs them; None: whatever the iterable source gives.

    `attached`: a descriptor comes along with the "indices", too many for a packet, or the source's "state" at this
    position.
    """

    epoch: int
    index: int
    indices: bytes | None
    attached: str = ""


class Fetched(_Message, frozen=True):
    """The file is there."""

    epoch: int
    index: int


class SourceEnded(_Message, frozen=True):
    """The iterable source has no batch `index`: its epoch has `length`."""

    epoch: int
    index: int
    length: int


class NotFetched(_Message, frozen=True):
    """As Failed; and "skip": too many batches would have to be made before this one."""

    epoch: int
    index: int
    kind: str
    type_name: str
    text: str


FromReader: TypeAlias = Open | Seek | Took | Pause | Again
ToReader: TypeAlias = Opened | Sought | Window | Ended | Failed | Skipped | Refused
FromFetcher: TypeAlias = Fetched | SourceEnded | NotFetched | Skipped

_T = TypeVar("_T")
_encoder = msgspec.msgpack.Encoder()
_from_reader: msgspec.msgpack.Decoder[FromReader] = msgspec.msgpack.Decoder(FromReader)
_to_reader: msgspec.msgpack.Decoder[ToReader] = msgspec.msgpack.Decoder(ToReader)
_from_fetcher: msgspec.msgpack.Decoder[FromFetcher] = msgspec.msgpack.Decoder(FromFetcher)
_fetch: msgspec.msgpack.Decoder[Fetch] = msgspec.msgpack.Decoder(Fetch)


def encode(message: _Message) -> bytes:
    """The message as one packet. Raises MessageError when it exceeds MAX_PACKET_BYTES."""
    data = _encoder.encode(message)
    if len(data) > MAX_PACKET_BYTES:
        raise MessageError(f"{type(message).__name__} of {len(data)} bytes exceeds {MAX_PACKET_BYTES}")
    return data


def decode_from_reader(data: bytes) -> FromReader:
    """What a reader said. Raises MessageError for anything else."""
    return _decode(_from_reader, data)


def decode_to_reader(data: bytes) -> ToReader:
    """What a producer said. Raises MessageError for anything else."""
    return _decode(_to_reader, data)


def decode_from_fetcher(data: bytes) -> FromFetcher:
    """What a fetcher said. Raises MessageError for anything else."""
    return _decode(_from_fetcher, data)


def decode_fetch(data: bytes) -> Fetch:
    """What a producer asks of a fetcher. Raises MessageError for anything else."""
    return _decode(_fetch, data)


def _decode(decoder: msgspec.msgpack.Decoder[_T], data: bytes) -> _T:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise MessageError(str(error)) from None
