"""Which of the addresses where gloo listens are this node's."""

from __future__ import annotations

from collections.abc import Sequence

import psutil


def of_this_node(listeners: Sequence[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """Those that a worker here can be behind; all of them where that cannot be told."""
    try:
        own = {entry.address.partition("%")[0] for found in psutil.net_if_addrs().values() for entry in found}
    except OSError:
        return tuple(listeners)
    here = tuple(listener for listener in listeners if listener[0] in own or listener[0].startswith("127."))
    return here or tuple(listeners)
