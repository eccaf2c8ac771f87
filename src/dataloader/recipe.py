"""How a producer gets the user's loader: the same way multiprocessing's "spawn" method gets a target function.

The factory is pickled, functions by their qualified names; the producer imports the training script as `__mp_main__`,
if the factory is of it, and calls the factory. The pickle goes only from a process to a descendant of its own user's
launcher: in an anonymous file whose descriptor travels over a unix socket in a 0700 directory, and the receiver checks
with SO_PEERCRED that the sender is of its own user. Whoever can send it could as well start a process: this is the
trust of multiprocessing, no more. Everything else that is said is typed (`protocol/dataloader.py`).
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from ..protocol.dataloader import MAX_RECIPE_BYTES
from ..protocol.names import AGENT_ENDPOINT, DATA_ENDPOINT, WORKER_IDENTITY
from .errors import ProducerError

_OF_THE_WORKER = (AGENT_ENDPOINT, WORKER_IDENTITY, DATA_ENDPOINT)
"""What a producer must not take for its own: it is no worker."""

inside_producer = False
"""Whether this process makes batches: a loader that is made here means that the script trains when it is imported."""


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a new process needs to call the factory as the worker would have."""

    factory: bytes
    """Pickled."""
    environment: dict[str, str]
    path: list[str]
    arguments: list[str]
    directory: str
    main_name: str | None
    """The training script as a module, or as a file; neither if the factory is not of it."""
    main_path: str | None


def pack(factory: Callable[[], Any]) -> bytes:
    """The recipe of a factory. Raises ProducerError for one that another process cannot call."""
    from multiprocessing import spawn

    try:
        pickled = pickle.dumps(factory, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # whatever __reduce__ and __getstate__ raise
        raise ProducerError(
            f"the loader factory cannot be given to another process: {error}. It must be a function of a module or of "
            "the script, or functools.partial of one with arguments that can be pickled; a lambda or a nested function "
            "cannot"
        ) from error
    preparation: dict[str, Any] = {}
    if b"__main__" in pickled:
        preparation = spawn.get_preparation_data("hyperpodrun-producer")
    return msgspec.msgpack.encode(
        Recipe(
            pickled,
            {name: value for name, value in os.environ.items() if name not in _OF_THE_WORKER},
            [os.getcwd() if entry == "" else entry for entry in sys.path],
            list(sys.argv),
            os.getcwd(),
            preparation.get("init_main_from_name"),
            preparation.get("init_main_from_path"),
        )
    )


def unpack(fd: int) -> Recipe:
    """Reads a recipe from its file. Raises ProducerError for what is none, or too large."""
    size = os.fstat(fd).st_size
    if size > MAX_RECIPE_BYTES:
        raise ProducerError(f"the loader factory is {size} bytes when pickled; let it open its data, not carry it")
    with open(fd, "rb", closefd=False) as file:
        file.seek(0)
        data = file.read(size)
    try:
        return msgspec.msgpack.decode(data, type=Recipe)
    except msgspec.MsgspecError as error:
        raise ProducerError(f"not a recipe: {error}") from None


def prepare(recipe: Recipe) -> Any:
    """Makes this process one in which the factory can be called, and gives the factory. Raises what imports raise."""
    global inside_producer
    from multiprocessing import spawn

    inside_producer = True
    os.environ.clear()
    os.environ.update(recipe.environment)
    data: dict[str, Any] = {"sys_path": recipe.path, "sys_argv": recipe.arguments, "dir": recipe.directory}
    if recipe.main_name is not None:
        data["init_main_from_name"] = recipe.main_name
    elif recipe.main_path is not None:
        data["init_main_from_path"] = recipe.main_path
    spawn.prepare(data)
    return pickle.loads(recipe.factory)
