"""How a producer comes to be: in a process that the host has just forked, the user's factory makes the loader.

What goes wrong until then, a failing import, an exception of the factory, its sys.exit, goes to the training loop.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from ...protocol import dataloader as protocol
from ...protocol.messages import shorten
from .. import recipe, wire
from ..sources import seeds
from ..storing.directories import StreamDirectory, open_stream
from .forked import die_with_parent, log
from .producer import Producer

_LEAVING_S = 60.0
"""So long readers of a factory that gives several loaders may take to go."""


def main(parent: int, control: socket.socket, opened: protocol.Open, fds: list[int], job: Path, key: bytes) -> None:
    """The life of a producer, in a process just forked; does not return."""
    code = 1
    try:
        die_with_parent(parent, "hpr-producer")
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        code = _serve(control, opened, fds, job, key)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _serve(control: socket.socket, opened: protocol.Open, fds: list[int], job: Path, key: bytes) -> int:
    line_fd, recipe_fd = fds
    try:
        directory, manifest = open_stream(job, opened, key)
        loader = _make_loader(opened, recipe_fd, manifest.seed)
    except BaseException as error:  # the user's import, factory or sys.exit: it goes to the training loop
        _refuse(control, line_fd, error)
        return 1
    several = len(loader) if isinstance(loader, list | tuple) else 0
    if several:
        _tell_several(line_fd, several, directory, manifest.seed)
        return 0
    producer = Producer(loader, opened, directory, manifest, key)
    producer.accept(opened, [line_fd])
    os.close(recipe_fd)
    producer.run(control)
    return 0


def _make_loader(opened: protocol.Open, recipe_fd: int, seed: int) -> Any:
    factory = recipe.prepare(recipe.unpack(recipe_fd))
    seeds.set_seed(seeds.derive(seed, 0, seeds.FACTORY))
    started = time.monotonic()
    loader = factory()
    log("data-producer", stream=opened.stream, pid=os.getpid(), factory_s=f"{time.monotonic() - started:.2f}")
    if not isinstance(loader, list | tuple) and not hasattr(loader, "__iter__"):
        raise TypeError(f"the loader factory gave {type(loader).__name__}, which cannot be iterated")
    return loader


def _tell_several(line_fd: int, several: int, directory: StreamDirectory, seed: int) -> None:
    with socket.socket(fileno=line_fd) as line:
        line.send(
            protocol.encode(
                protocol.Opened(os.getpid(), str(directory.path), directory.mark, seed, None, False, several, b"")
            )
        )
        line.settimeout(_LEAVING_S)
        with contextlib.suppress(OSError):
            wire.receive(line)  # until it has gone: an early end of the line would look like a death


def _refuse(control: socket.socket, line_fd: int, error: BaseException) -> None:
    """Tells everybody who waits that there will be no batches, and why."""
    text = shorten("".join(traceback.format_exception(error)), protocol.MAX_TEXT)
    packet = protocol.encode(protocol.Refused("factory", type(error).__name__, text))
    lines = [line_fd]
    control.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            data, fds = wire.receive(control, 2)
            if not data:
                break
            lines.append(fds[0])
    for fd in lines:
        with socket.socket(fileno=fd) as line, contextlib.suppress(OSError):
            line.send(packet)
