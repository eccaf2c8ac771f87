"""`init_process_group()` over one store connection for the life of the process, with fresh keys every time.

torch's own `env://` handler opens a new connection to the store for every group; each costs a resolver look-up that
can stall for seconds, and in the agent's store the new group would find the keys of the last one. This handler takes
its place in processes under HPWrapper: same arguments, same result, one C++ TCPStore client, and a PrefixStore that is
new for every epoch and every call in it. The store itself, and torch, stay as they are.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qsl, urlparse

from ..protocol.names import STORE_ENDPOINT, epoch_prefix


class RootlessRendezvous:
    """The `env://` handler of one process."""

    def __init__(self) -> None:
        self._client: Any = None
        self._prefix = ""
        self._groups = 0

    def install(self) -> None:
        """Takes the place of torch's handler where the agent serves the store."""
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return
        from torch.distributed import is_available

        if is_available():
            # Not `from torch.distributed import rendezvous`: that name is a function there.
            module: Any = importlib.import_module("torch.distributed.rendezvous")
            module._rendezvous_handlers["env"] = self

    def enter(self, epoch: int) -> None:
        """Keys from now on belong to `epoch`."""
        self._prefix = epoch_prefix(epoch)
        self._groups = 0

    def __call__(self, url: str, timeout: timedelta = timedelta(minutes=30), **_: Any) -> Iterator[Any]:
        from torch.distributed import PrefixStore  # missing in its __all__

        query = dict(parse_qsl(urlparse(url).query))
        rank = int(query.get("rank") or _required("RANK"))
        world_size = int(query.get("world_size") or _required("WORLD_SIZE"))
        store = PrefixStore(f"{self._prefix}/{self._groups}", self._connect(timeout))
        self._groups += 1
        yield store, rank, world_size
        raise RuntimeError("Unable to perform re-rendezvous using env:// method")

    def _connect(self, timeout: timedelta) -> Any:
        if self._client is None:
            from torch.distributed import TCPStore

            host, port = _own_store()
            clients: list[Any] = []

            def connect() -> None:
                _do_not_query_dns()
                clients.append(TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout))

            thread = threading.Thread(target=connect, name="hyperpodrun-store-connect")
            thread.start()
            thread.join()  # to an agent on this host: accepted or refused at once
            if not clients:
                raise ConnectionError(f"the agent's store at {host}:{port} does not answer")
            self._client = clients[0]
        return self._client


def _own_store() -> tuple[str, int]:
    """Where this node's store listens: the agent passes on what another node's must answer."""
    host, _, port = os.environ.get(STORE_ENDPOINT, "").rpartition(":")
    return (host, int(port)) if host else (_required("MASTER_ADDR"), int(_required("MASTER_PORT")))


def _do_not_query_dns() -> None:
    """In the calling thread, names are looked up in files only.

    torch asks for the name of every address it connects to, for its log. Where /etc/hosts does not have it, one such
    query in forty stalls for five seconds here. glibc keeps the resolver's state, two ints and more, for each thread.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "__res_state"):  # not glibc
        return
    libc.__res_state.restype = ctypes.POINTER(ctypes.c_int)
    libc.__res_init()
    libc.__res_state()[1] = 0  # struct __res_state: retrans, retry, ...


def _required(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise ValueError(
            f"Error initializing torch.distributed using env:// rendezvous: environment variable {name} expected, "
            "but not set"
        )
    return value
