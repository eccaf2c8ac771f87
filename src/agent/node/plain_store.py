"""`HPCT_USE_ROOTLESS=0`: the workers of all nodes dial the first node's store, as under torchrun.

Owns the listening sockets of this node's store towards other machines, and knows which node's store is everybody's.
A script's own connections have no word for the epoch they are of: it is the one that is current when they are let in.
So the door is shut from the restart of all processes until the store serves their epoch, and wherever this node is not
the first. Called by: `local.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ...rootless.listening import listen

if TYPE_CHECKING:
    from ...rootless.admission import Doorkeeper

PORT_OFFSET = 100
"""The store's port is the agent's and this: every node knows it of every other."""


class PlainStore:
    """`own()` is this node's number, `find(node)` where another's store listens."""

    def __init__(
        self,
        door: Doorkeeper,
        host: str,
        port: int,
        own: Callable[[], int],
        find: Callable[[int], tuple[str, int] | None],
    ) -> None:
        """Listens on the numeric address, or on all for `*`. Raises OSError with a sentence."""
        self._sockets = listen(host, port)
        self._door = door
        self._own = own
        self._find = find
        self.address: tuple[str, int] | None = None
        """Of the store that is everybody's."""

    def epoch_opened(self, first: int) -> None:
        """The store serves another epoch; `first` is the node of rank 0."""
        self.address = self._find(first)
        self.epoch_ended()
        if first == self._own():
            self._door.open(self._sockets)

    def epoch_ended(self) -> None:
        """Who comes now belongs to the next epoch."""
        self._door.shut()

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()
