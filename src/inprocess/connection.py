"""The worker's end of the conversation with its agent: messages out, messages in, nothing decided.

The ZeroMQ socket belongs to one thread, the monitor (`monitor.py`), which waits on it and on a wake-up descriptor; the
main thread only puts messages into a queue. Waits have no deadline of their own here: the agent owns them
(--inprocess-timeout), and this process dies with its agent.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Mapping

import zmq

from ..protocol import messages
from ..protocol.names import AGENT_ENDPOINT, WORKER_IDENTITY, parse_identity


class AgentConnection:
    """A DEALER socket to the agent of this node. One per process, for its whole life."""

    def __init__(self, endpoint: str, identity: str) -> None:
        parse_identity(identity)
        self._outgoing: deque[messages.WorkerMessage] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, identity.encode())
        self._socket.setsockopt(zmq.MAXMSGSIZE, messages.MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.connect(endpoint)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake, zmq.POLLIN)

    def send(self, message: messages.WorkerMessage) -> None:
        """Queues a message. From any thread."""
        self._outgoing.append(message)
        self.wake()

    def wake(self) -> None:
        """Ends the wait in `exchange`. From any thread."""
        os.eventfd_write(self._wake, 1)

    def exchange(self, timeout: float | None) -> list[messages.AgentMessage]:
        """Sends what is queued and gives what has arrived; waits up to `timeout` seconds for either.

        On the monitor thread only. Raises MessageError for what is not a message: agent and worker are of one
        version, so that is a bug and not to be lived with.
        """
        self._poller.poll(None if timeout is None else int(timeout * 1000))
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while self._outgoing:
            self._socket.send(messages.encode(self._outgoing.popleft()))
        arrived: list[messages.AgentMessage] = []
        while True:
            try:
                arrived.append(messages.decode_from_agent(self._socket.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return arrived

    def close(self) -> None:
        """Sends what is queued and closes. On the thread that uses the socket."""
        while self._outgoing:
            self._socket.send(messages.encode(self._outgoing.popleft()))
        self._socket.close()
        self._context.term()
        os.close(self._wake)


class HPAgentK8sAPIFactory:
    """Makes the connection to this process's agent; None where there is no agent to connect to.

    HyperPod's name for it, kept so that its scripts run unchanged: here the agent is ours, on Kubernetes or not.
    """

    def __call__(self, environ: Mapping[str, str] = os.environ) -> AgentConnection | None:
        endpoint, identity = environ.get(AGENT_ENDPOINT), environ.get(WORKER_IDENTITY)
        if not endpoint or not identity:
            return None
        return AgentConnection(endpoint, identity)
