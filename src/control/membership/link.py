"""One end of the conversation between a controller and a follower in one term: once, in order, nothing lost.

The transport is TCP, which loses nothing while a connection lasts; a reconnection can lose what was under way. So
messages are numbered, kept until the other end has confirmed them, and sent again when a heartbeat shows that they
have not come. Where nothing is lost this costs no message.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

_RESEND_AFTER_S = 0.5
_EARLY_LIMIT = 4096
"""So many messages are kept that came before one that is missing; the others will be sent again."""

Out = TypeVar("Out")
In = TypeVar("In")


class Link(Generic[Out, In]):
    """`Out` is sent, `In` is received."""

    def __init__(self) -> None:
        self.sent = 0
        self.received = 0
        self._kept: deque[tuple[int, Out, float]] = deque()
        self._early: dict[int, In] = {}
        self._asked = float("-inf")

    def send(self, message: Out, now: float) -> int:
        """Keeps the message until it is confirmed; its number."""
        self.sent += 1
        self._kept.append((self.sent, message, now))
        return self.sent

    def receive(self, serial: int, message: In) -> list[In]:
        """What can be dealt with now: nothing, if this came before or comes too early."""
        if serial <= self.received or (serial > self.received + 1 and len(self._early) >= _EARLY_LIMIT):
            return []
        self._early[serial] = message
        ready: list[In] = []
        while self.received + 1 in self._early:
            self.received += 1
            ready.append(self._early.pop(self.received))
        return ready

    def confirm(self, received: int) -> None:
        """The other end has received so many."""
        while self._kept and self._kept[0][0] <= received:
            self._kept.popleft()

    def overdue(self, now: float) -> list[tuple[int, Out]]:
        """What should have been confirmed by now, to be sent again."""
        late = [(serial, message) for serial, message, at in self._kept if at + _RESEND_AFTER_S <= now]
        if late:
            self._kept = deque(
                (serial, message, now if at + _RESEND_AFTER_S <= now else at) for serial, message, at in self._kept
            )
        return late

    def must_ask(self, sent: int, now: float) -> bool:
        """Whether to say at once that something has not come of what the other end has `sent`.

        Not again until it can have been sent again: two ends that both miss something would else answer each other's
        question with a question, as fast as the network carries them.
        """
        if sent <= self.received or now < self._asked + _RESEND_AFTER_S:
            return False
        self._asked = now
        return True

    @property
    def all_confirmed(self) -> bool:
        return not self._kept
