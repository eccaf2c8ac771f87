"""A reader's conversation with its producer: opened when needed, opened again when the producer has died.

Packets are whole or not there, so an exception that interrupts the training loop at any point leaves nothing half
done: what was not received is still to be received.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...protocol import dataloader as protocol
from ...protocol.dataloader import Position
from ...protocol.messages import MessageError
from ...protocol.names import DATA_ENDPOINT
from .. import recipe, wire
from ..errors import ProducerError, StreamTakenError, user_error
from ..preparing import standalone
from ..storing.directories import StreamDirectory
from ..storing.encryption import sealer
from . import fingerprints

_CONNECT_S = 60.0
_DEATHS = 5
"""So many producers in a row that die before they have a batch ready, and there will be no other."""
_read_before: dict[tuple[str, str], str] = {}
"""What the objects held with which this process has last opened a stream, by its cache directory and name."""


class Connection:
    """What the reader knows of its stream. Its fields are as of the last message that was received."""

    def __init__(
        self,
        factory: Callable[[], Any],
        stream: str,
        options: protocol.StreamOptions,
        seed: int,
        insist: bool,
    ) -> None:
        self._recipe = recipe.pack(factory)
        self._digest = fingerprints.of_recipe(factory)
        self._content = fingerprints.of_contents(factory)
        key = (options.cache_dir, stream)
        self._renew = _read_before.get(key, self._content) != self._content
        """Until the producer has answered: this process has read other data under this name."""
        _read_before[key] = self._content
        self._stream = stream
        self._options = options
        self._seed = seed
        self._insist = insist
        self._line: socket.socket | None = None
        self._deaths = 0
        self.generation = 0
        """Grows with every connection: what was said on an earlier one has been lost."""
        self._serial = 0
        self._awaited = 0
        """The serial of the last Seek or Again: until it is answered, what is said of the window is out of date."""
        self.opened: protocol.Opened | None = None
        self.directory: StreamDirectory | None = None
        self.position: Position | None = None
        """Where the producer takes this reader to be."""
        self.until: Position = (0, 0)
        self.lengths: dict[int, int] = {}
        self.failures: dict[Position, protocol.Failed] = {}
        self.skipped: protocol.Skipped | None = None

    # ---- opening -----------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Asks for the stream, if that has not been done; does not wait for the answer."""
        if self._line is not None:
            return
        identity = (self._digest, self._content, self._seed)
        opening = protocol.Open(protocol.VERSION, self._stream, self._options, *identity, self._insist, self._renew)
        line = self._connect()
        fd = wire.anonymous_file("recipe", self._recipe)
        try:
            socket.send_fds(line, [protocol.encode(opening)], [fd])
        except OSError as error:
            line.close()
            self._died(error)
            return
        finally:
            os.close(fd)
        self._line = line
        self.generation += 1

    @staticmethod
    def _connect() -> socket.socket:
        endpoint = os.environ.get(DATA_ENDPOINT)
        try:
            if endpoint and Path(endpoint).is_socket():
                return wire.connect(endpoint, _CONNECT_S)
            return standalone.connect(_CONNECT_S)
        except OSError as error:
            where = endpoint or "this job's own"
            raise ProducerError(f"no connection to the host of producers ({where}): {error}") from error

    def await_open(self, timeout: float) -> protocol.Opened:
        """Waits until the user's loader exists. Raises what its factory raised, ProducerError after `timeout` s."""
        deadline = time.monotonic() + timeout
        while self.opened is None:
            self.open()
            self.receive(deadline, f"the loader factory of stream {self._stream!r} has not returned", timeout)
        return self.opened

    def await_one(self, timeout: float) -> protocol.Opened:
        """The same, for who wants one loader. Raises ProducerError where the factory gives several."""
        opened = self.await_open(timeout)
        if opened.loaders:
            raise ProducerError(
                f"the loader factory of stream {self._stream!r} gives {opened.loaders} loaders: each needs an "
                "MMAPDataLoader of its own"
            )
        return opened

    @property
    def identity(self) -> tuple[int, str]:
        """(seed, digest of the recipe). Streams of one name give the same batches where these are the same."""
        return self._seed, self._digest

    def close(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            line.close()

    # ---- saying ------------------------------------------------------------------------------------------------

    def seek(self, epoch: int | None, index: int, state_fd: int | None = None) -> None:
        """The next batch to be read; `await_sought` then gives its place."""
        self._serial += 1
        self._awaited = self._serial
        self.position = None
        message = protocol.Seek(self._serial, epoch, index, state_fd is not None)
        self._send(message, [] if state_fd is None else [state_fd])

    def again(self, position: Position, reason: str) -> None:
        """The file of a batch is of no use."""
        self._serial += 1
        self._awaited = self._serial
        self.failures.pop(position, None)
        self.until = min(self.until, position)
        self._send(protocol.Again(self._serial, *position, reason[:2000]))

    def took(self, position: Position) -> None:
        self._send(protocol.Took(*position))

    def pause(self) -> None:
        """Never raises, as garbage collection says it: a producer that is gone waits for nobody."""
        if self._line is not None:
            with contextlib.suppress(OSError):
                self._line.send(protocol.encode(protocol.Pause()))

    def _send(self, message: Any, fds: list[int] | None = None) -> None:
        """A producer that is gone is noticed here, and asked for anew."""
        if self._line is None:
            return
        try:
            if fds:
                socket.send_fds(self._line, [protocol.encode(message)], fds)
            else:
                self._line.send(protocol.encode(message))
        except TimeoutError:
            raise ProducerError(f"the producer of stream {self._stream!r} takes no messages any more") from None
        except OSError as error:
            self._drain()
            self._died(error)

    def _drain(self) -> None:
        """The producer's last words. Raises what they say, if it is more than that it has died."""
        while self._line is not None:
            self._line.settimeout(0)
            try:
                data, _ = wire.receive(self._line)
            except OSError:
                return
            if not data:
                return
            self._take_in(protocol.decode_to_reader(data))

    @property
    def connected(self) -> bool:
        return self._line is not None

    # ---- hearing -----------------------------------------------------------------------------------------------

    def receive(self, deadline: float, what: str, limit: float) -> None:
        """Waits for a message and takes it in; returns too when the producer has died (`connected` is then False).

        Raises ProducerError after the deadline: `what` names the reason, `limit` the seconds it was given.
        """
        if not self.hear(deadline):
            raise ProducerError(f"{what} within {limit:g} s")

    def hear(self, deadline: float) -> bool:
        """The same, for who can do without: False after the deadline."""
        if self._line is None:
            return True
        self._line.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            data, _ = wire.receive(self._line)
        except TimeoutError:
            return False
        finally:
            if self._line is not None:
                self._line.settimeout(_CONNECT_S)
        if not data:
            self._died(None)
            return True
        try:
            self._take_in(protocol.decode_to_reader(data))
        except MessageError as error:
            self.close()
            raise ProducerError(
                f"the producer of stream {self._stream!r} said what is not in the protocol: {error}"
            ) from None
        return True

    def _take_in(self, message: protocol.ToReader) -> None:
        match message:
            case protocol.Window():
                if self._awaited == 0:
                    self.until = (message.epoch, message.index)
                    self._deaths = 0
            case protocol.Ended():
                self.lengths[message.epoch] = message.length
            case protocol.Sought():
                if message.serial == self._awaited:
                    self._awaited = 0
                if self._awaited == 0:
                    self.position = self.until = (message.epoch, message.index)
            case protocol.Failed():
                self.failures[message.epoch, message.index] = message
            case protocol.Skipped():
                self.skipped = message
            case protocol.Opened():
                self.opened = message
                self.directory = StreamDirectory(Path(message.directory), message.mark, sealer(message.key))
                self._seed, self._insist, self._renew = message.seed, False, False
            case protocol.Refused():
                self.close()
                if message.kind == "factory":
                    raise user_error(
                        message.type_name,
                        f"the loader factory of stream {self._stream!r} failed in the producer:\n{message.text}"
                        f"{_hint(message.text)}",
                    )
                raise (StreamTakenError if message.kind == "taken" else ProducerError)(message.text)

    def _died(self, error: OSError | None) -> None:
        self.close()
        self._awaited = 0
        self.failures.clear()
        self._deaths += 1
        if self._deaths >= _DEATHS:
            self._deaths = 0
            raise ProducerError(
                f"{_DEATHS} producers of stream {self._stream!r} died, one after the other, before a batch was ready"
                + (f" ({error})" if error else "")
                + ": their messages are above, in the launcher's output; out of memory?"
            )


def _hint(text: str) -> str:
    if "Default process group has not been initialized" in text:
        return (
            "\nThe factory runs in the producer, which belongs to no process group: give DistributedSampler "
            "num_replicas= and rank= (the factory may read WORLD_SIZE and RANK from os.environ)."
        )
    return ""
