"""Names are looked up on threads that nobody has to wait for: a resolver can hang for as long as it likes.

The event loop's own threads would be waited for when it ends. Called by: `transport.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from typing import Any

Addresses = list[Any]
"""As `socket.getaddrinfo` gives them."""


class Resolver:
    """Looks names up for one event loop. A name that is being looked up is not asked for twice."""

    def __init__(self) -> None:
        self._under_way: dict[tuple[str, int], asyncio.Future[Addresses]] = {}

    async def look_up(self, host: str, port: int, limit: float) -> Addresses:
        """Raises OSError or UnicodeError for a name that there is not, asyncio.TimeoutError after `limit` seconds."""
        known = self._under_way.get((host, port))
        if known is None:
            known = self._under_way[host, port] = self._ask(host, port)
        return await asyncio.wait_for(asyncio.shield(known), limit)

    def _ask(self, host: str, port: int) -> asyncio.Future[Addresses]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Addresses] = loop.create_future()

        def tell(found: Addresses | None, error: Exception | None) -> None:
            self._under_way.pop((host, port), None)
            if error is None:
                answer.set_result(found or [])
            else:
                answer.set_exception(error)
                answer.exception()  # who asked may have given up

        def ask() -> None:
            found, error = None, None
            try:
                found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            except (OSError, UnicodeError) as problem:
                error = problem
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(tell, found, error)

        threading.Thread(target=ask, name="hyperpodrun-resolver", daemon=True).start()
        return answer
