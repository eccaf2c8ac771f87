"""Who decides for a job on many nodes: `control.membership.node.Node`, which talks to its like on the other nodes.

Owns the connection with them. A shell: it decodes what they say, carries out the node's actions in order, and decides
nothing. Called by: `agent.py`.
"""

from __future__ import annotations

import os
import time
import zlib
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING

from msgspec.structs import replace

from ...control.job import commands as cmd
from ...control.job import events as ev
from ...control.membership import messages as msg
from ...control.membership.node import Node
from ...control.membership.patience import WAITS
from ...control.membership.roles import NodeConfig
from ...protocol.messages import MessageError
from ...rendezvous.addresses import PORTS, format_address, parse_address, port_warning
from ..config import Cluster, LaunchConfig
from ..output.console import Console
from .local import LocalNode
from .plain_store import PORT_OFFSET
from .sole import job_config
from .timer import Timer

if TYPE_CHECKING:
    import asyncio

    from ...rendezvous.transport import Transport
    from ...rootless.shard_messages import StoreMessage
    from ...rootless.shards import Shards


_HINT = "a job of its own needs an endpoint of its own"
_ASK_AGAIN_S = 0.2
"""After a connection has closed, what was said to the store at its other end is said again."""


class ClusterHead:
    """Gives what happens to the node, and the node's actions to whom they concern."""

    def __init__(
        self,
        config: LaunchConfig,
        console: Console,
        node: LocalNode,
        on_end: Callable[[cmd.End], None],
    ) -> None:
        assert config.cluster is not None
        self._config = config
        self._cluster: Cluster = config.cluster
        self._console = console
        self._local = node
        self._on_end = on_end
        self._transport: Transport | None = None
        self._node: Node | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sharing: Shards | None = None
        self._addresses: dict[int, str] = {}
        self._numbers: dict[str, int] = {}
        self._at: dict[str, list[int]] = {}
        """While a member is replaced there are two at its address."""
        self._number = -1
        self._listens = ""
        self._job = 0
        """The incarnation of the job: its epochs are not those of another."""
        self._waiting: list[msg.NodeEvent] = []
        self._busy = False
        self._timer = Timer(self._next_deadline, lambda: self.handle(ev.TimePassed()))

    def begin(self) -> None:
        """Who is in the job is not known yet; the standby source imports meanwhile."""

    async def serve(self, loop: asyncio.AbstractEventLoop) -> None:
        """Binds the port and begins to look for the job, or to found it. Raises OSError if there is no free port."""
        from ...rendezvous.incoming import descriptor_warning
        from ...rendezvous.keys import derive_keys
        from ...rendezvous.transport import Transport

        self._loop = loop
        self._sharing = self._local.share_store(self._send_store, lambda: self._number)
        cluster = self._cluster
        key = os.urandom(6).hex()
        keys = None if cluster.secret is None else derive_keys(cluster.secret, self._config.run_id)
        self._transport = Transport(key, keys, self._console.log)
        port = self._transport.bind(cluster.bind, cluster.first_port, PORTS)
        warning = port_warning(port, port)
        if warning is not None:
            self._console.log("ephemeral-ports", message=warning)
        if not self._config.rootless:
            self._serve_plainly(port + PORT_OFFSET)
        warning = descriptor_warning(self._config.nodes[1])
        if warning is not None:
            self._console.log("descriptors", message=warning)
        self._listens = format_address(cluster.bind, port)
        because = self._config.rendezvous.because
        if because:
            nodes = "{}:{}".format(*self._config.nodes)
            self._console.log("nodes", nodes=nodes, endpoint=self._config.rendezvous.endpoint, because=because)
        own = None if cluster.own_seed is None else cluster.seeds[cluster.own_seed]
        is_seed = own is not None and parse_address(own)[1] == port
        address = own if own is not None and is_seed and cluster.as_seed else format_address(cluster.address, port)
        self._node = Node(self._node_config(key, address, is_seed=is_seed))
        self._transport.start(address, self._on_message, self._on_closed)
        self._console.debug("agent-listens", address=address, key=key)
        self._timer.start(loop)
        self.handle(ev.Begin())

    def _serve_plainly(self, port: int) -> None:
        self._local.serve_plainly(self._cluster.bind, port, lambda: self._number, self._find_store)
        warning = port_warning(port, port)
        if warning is not None:
            self._console.log("ephemeral-ports", message=warning)

    def _find_store(self, node: int) -> tuple[str, int] | None:
        """Where the workers of all nodes reach the store of one."""
        address = self._addresses.get(node)
        if address is None:
            return None
        host, port = parse_address(address)
        return host, port + PORT_OFFSET

    def _node_config(self, key: str, address: str, *, is_seed: bool) -> NodeConfig:
        cluster = self._cluster
        return NodeConfig(
            key=key,
            host=cluster.host,
            address=address,
            workers=self._config.nproc_per_node,
            run_id=self._config.run_id,
            job=job_config(self._config),
            seeds=cluster.seeds,
            founder=is_seed and cluster.own_seed == 0,
            deputy=(cluster.own_seed or 0) * cluster.heartbeat_limit if is_seed and cluster.own_seed else None,
            order=cluster.order,
            identity=cluster.identity,
            role=self._config.role,
            min_quorum=cluster.min_quorum,
            heartbeat_interval=cluster.heartbeat_interval,
            heartbeat_limit=cluster.heartbeat_limit,
            join_timeout=cluster.join_timeout,
            last_call_timeout=cluster.last_call_timeout,
            close_timeout=cluster.close_timeout,
            shutdown_timeout=self._config.shutdown_timeout,
        )

    def handle(self, event: msg.NodeEvent) -> None:
        """What happens here or elsewhere; what it brings about here is dealt with after it."""
        self._waiting.append(event)
        if self._busy or self._node is None:
            return
        self._busy = True
        try:
            while self._waiting:
                for action in self._decide(self._node, self._waiting.pop(0)):
                    self._do(action)
        finally:
            self._busy = False
        self._timer.set()

    def _decide(self, node: Node, event: msg.NodeEvent) -> list[msg.Action]:
        """What the node makes of an event. One that it cannot take costs whoever sent it, not this agent."""
        try:
            return list(node.handle(event, time.monotonic()))
        except Exception as error:
            if isinstance(event, msg.Received):
                assert self._transport is not None
                self._transport.refuse_agent(event.key, event.address, f"{type(event.message).__name__}: {error!r}")
            elif not self._local.blame(event, error):
                raise
            return []

    def _next_deadline(self) -> float | None:
        return None if self._node is None else self._node.next_deadline()

    def conclude(self) -> None:
        """The launch is over: no deadline counts any more."""
        self._timer.stop()

    def close(self) -> None:
        """What was said last is still sent."""
        if self._transport is not None:
            self._transport.close()

    # ---- the node's actions ----------------------------------------------------------------------------------------

    def _do(self, action: msg.Action) -> None:
        from ...rendezvous.sockets import CONTROL

        assert self._transport is not None
        match action:
            case msg.Send():
                try:
                    data = msg.encode(action.message)
                except MessageError as error:
                    self._console.log("message-too-large", to=action.address, reason=error, action="it is given up")
                    self._waiting.append(msg.Closed(action.address))
                    return
                self._transport.send(action.address, CONTROL, data)
            case msg.Execute():
                self._local.execute(action.command)
            case msg.Note():
                self._console.log(action.event, **action.fields, **(self._explain() if action.event == WAITS else {}))
            case msg.Members():
                members = sorted(action.configurations.everybody().items())
                self._addresses = {number: member.address for number, member in members}
                self._numbers = {member.address: number for number, member in members}
                self._at = defaultdict(list)
                for number, member in members:
                    self._at[member.address].append(number)
                self._number = -1 if action.own is None else action.own
                self._be_in(zlib.crc32(action.configurations.proposed.founder.encode()))
            case msg.Ended():
                if action.end.exit_code == 0 and not self._local.has_run:
                    self._console.log("spare", end="the job has succeeded, and nothing of it ran here", hint=_HINT)
                self._on_end(action.end)

    def _explain(self) -> dict[str, object]:
        """What who waits wants to know: where this node can be reached, and what became of its attempts."""
        assert self._transport is not None
        tried = "; ".join(f"{address}: {outcome}" for address, outcome in self._transport.tried.items())
        return {"listens": self._listens, "tried": tried or None}

    def _be_in(self, job: int) -> None:
        """Epochs of another incarnation may have the same numbers, and its stores have heard nothing of this one."""
        if job != self._job and self._sharing is not None:
            self._sharing.leave()
        self._job = job

    # ---- the store of many nodes -----------------------------------------------------------------------------------

    def _send_store(self, node: int, message: StoreMessage) -> None:
        from ...rendezvous.sockets import STORE
        from ...rootless import shard_messages

        assert self._transport is not None
        address = self._addresses.get(node)
        if address is not None:  # else the epoch is about to fail
            self._transport.send(address, STORE, shard_messages.encode(replace(message, job=self._job)))

    def _on_store_message(self, key: str, address: str, data: bytes) -> None:
        from ...rootless import shard_messages
        from ...rootless.wire import WireError

        assert self._sharing is not None
        node = self._numbers.get(address)
        if node is None:  # no member, or none any more
            return
        message = shard_messages.decode(data)
        if message.job != self._job:  # it was in the job before it was begun again
            return
        try:
            self._sharing.receive(node, key, message, time.monotonic_ns())
        except WireError as error:
            raise MessageError(str(error)) from error
        except Exception as error:  # whatever it is, it belongs to who sent it
            raise MessageError(f"{type(message).__name__}: {error!r}") from error

    def _ask_again(self, address: str) -> None:
        assert self._sharing is not None
        for number in self._at.get(address, ()):
            self._sharing.lost(number)

    # ---- what happens ----------------------------------------------------------------------------------------------

    def _on_message(self, key: str, address: str, channel: bytes, data: bytes) -> None:
        from ...rendezvous.sockets import STORE

        assert self._transport is not None
        try:
            if channel == STORE:
                self._on_store_message(key, address, data)
                return
            message = msg.decode(data)
        except MessageError as error:
            self._transport.refuse_agent(key, address, error)
            return
        self.handle(msg.Received(key, address, message))

    def _on_closed(self, address: str, key: str) -> None:
        if self._loop is not None and address in self._at:
            self._loop.call_later(_ASK_AGAIN_S, self._ask_again, address)
        self.handle(msg.Closed(address, key))
