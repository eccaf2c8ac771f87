"""A keyspace without a server: requests of several sessions, and what each of them hears."""

from __future__ import annotations

from collections.abc import Iterable

from hyperpodrun.rootless import requests as rq
from hyperpodrun.rootless.keyspace import Keyspace
from hyperpodrun.rootless.namespace import Session
from hyperpodrun.rootless.waits import Answer


class Desk:
    """A keyspace whose answers pile up by session."""

    def __init__(self, epoch: int = 0) -> None:
        self.keyspace = Keyspace(epoch)
        self.inbox: dict[Session, list[bytes]] = {}
        self.now_ns = 0

    def open(self) -> Session:
        session = self.keyspace.open()
        self.inbox[session] = []
        return session

    def _deliver(self, answers: Iterable[Answer]) -> None:
        for session, reply in answers:
            self.inbox[session].append(b"".join(reply))

    def ask(self, session: Session, request: rq.Request) -> bytes | None:
        """Apply a request; the one answer that its session has got since, or None."""
        self.now_ns += 1
        self._deliver(self.keyspace.apply(session, request, self.now_ns))
        return self.heard(session)

    def heard(self, session: Session) -> bytes | None:
        answers = self.inbox[session]
        assert len(answers) <= 1
        return answers.pop() if answers else None

    def advance(self, epoch: int) -> None:
        self._deliver(self.keyspace.advance(epoch))

    def cancel(self, epoch: int) -> int:
        answers = self.keyspace.cancel(epoch)
        self._deliver(answers)
        return len(answers)
