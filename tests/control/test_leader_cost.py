"""What one follower says costs the whole controller as much among 400 nodes as among 200."""

from __future__ import annotations

from hyperpodrun.control.job import commands as cmd
from hyperpodrun.control.job import events as ev
from hyperpodrun.control.job.state import JobConfig
from hyperpodrun.control.membership import messages as msg
from hyperpodrun.control.membership.link import Link
from hyperpodrun.control.membership.node import Node
from hyperpodrun.control.membership.roles import NodeConfig
from many_nodes import WORKERS, count


class Cluster:
    """A real controller; the other nodes answer what it must hear, and nothing happens on them."""

    def __init__(self, nodes: int) -> None:
        job = JobConfig(world_size=0, in_process=True, min_nodes=nodes, max_nodes=nodes)
        config = NodeConfig("k0", "h0", "h0:1", WORKERS, "run", job, seeds=("h0:1",), founder=True)
        self.node = Node(config)
        self.links: dict[str, Link[msg.Told, msg.Order]] = {}
        self.numbers: dict[str, int] = {}
        self.term = 0
        self.processes: dict[int, tuple[str, int]] = {}
        """By rank: where it is, and its incarnation."""
        self.handle(ev.Begin())
        for index in range(1, nodes):
            address = f"h{index}:1"
            join = msg.Join("run", f"k{index}", f"h{index}", address, WORKERS)
            self.handle(msg.Received(f"k{index}", address, join))

    def handle(self, event: msg.NodeEvent) -> None:
        """What it says is answered."""
        waiting = [event]
        while waiting:
            for action in self.node.handle(waiting.pop(0), 1.0):
                if isinstance(action, msg.Send):
                    waiting += self._answers(action.address, action.message)

    def tell(self, address: str, event: msg.Told) -> msg.Received:
        """A follower's message, on its way."""
        link = self.links[address]
        serial = link.send(event, 1.0)
        tell = msg.Tell(self.term, self.numbers[address], serial, link.received, event)
        return msg.Received(f"k{address[1:-2]}", address, tell)

    def cost(self, rank: int, event: ev.Event) -> int:
        """Of what a process of this rank has said, in instructions."""
        received = self.tell(self.processes[rank][0], event)  # type: ignore[arg-type]

        def take() -> None:
            self.node.handle(received, 1.0)
            self.node.next_deadline()

        return count(take)

    def _answers(self, address: str, message: msg.PeerMessage) -> list[msg.NodeEvent]:
        match message:
            case msg.Lead():
                self.term, self.links[address] = message.term, Link()
                assert message.configurations is not None
                member = message.configurations.find(f"k{address[1:-2]}")
                assert member is not None
                self.numbers[address] = member.number
                return [self.tell(address, msg.Report(message.configurations.proposed.id))]
            case msg.Order():
                return [
                    self.tell(address, answer)
                    for order in self.links[address].receive(message.serial, message)
                    for answer in self._obey(address, order)
                ]
        return []

    def _obey(self, address: str, order: msg.Order) -> list[msg.Told]:
        match order.command:
            case msg.Propose(change):
                return [msg.Acknowledge(change.id)]
            case cmd.OpenEpoch(epoch):
                return [ev.Opened(self.numbers[address], epoch)]
            case cmd.Spawn(rank, incarnation):
                self.processes[rank] = address, incarnation
        return []


def costs(nodes: int) -> dict[str, int]:
    cluster = Cluster(nodes)
    assert len(cluster.processes) == (nodes - 1) * WORKERS
    first, *others = sorted(cluster.processes)

    def arrived(rank: int) -> ev.Arrived:
        return ev.Arrived(rank, cluster.processes[rank][1], -1)

    found = {"attached": cluster.cost(first, ev.Attached(first, cluster.processes[first][1], 5.0))}
    cluster.handle(cluster.tell(cluster.processes[first][0], arrived(first)))
    found["arrived"] = cluster.cost(others[0], arrived(others[0]))
    found["said again"] = cluster.cost(others[0], arrived(others[0]))
    rank = others[1]
    found["exited"] = cluster.cost(rank, ev.Exited(rank, cluster.processes[rank][1], 1))
    return found


def test_the_cost_of_a_followers_word_does_not_depend_on_how_many_there_are() -> None:
    small, large = costs(200), costs(400)
    sends_to_all = {"exited"}
    for what, cost in small.items():
        assert large[what] <= (2.02 if what in sends_to_all else 1.05) * cost + 20, (what, cost, large[what])
