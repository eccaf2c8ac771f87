"""What every node remembers for the next controller: small, and told once."""

from __future__ import annotations

from hyperpodrun.control.job import commands as cmd
from hyperpodrun.control.job import events as ev
from hyperpodrun.control.job.shard_table import MAX_RUNS, ShardTable
from hyperpodrun.control.membership import messages as msg
from hyperpodrun.control.membership.leading.takeover import rebuild
from hyperpodrun.control.membership.local_state import LocalState
from many_nodes import ManyNodes

TABLE = (("a", 0, 1, 4),)


def memory(at: int, shards_at: int, *, told: bool) -> msg.JobMemory:
    return msg.JobMemory((1, at), shards=TABLE if told else None, shards_at=(1, shards_at))


def test_the_table_of_shards_is_kept_from_an_earlier_memory() -> None:
    local = LocalState()
    local.remember(memory(1, 5, told=True))
    local.remember(memory(2, 5, told=False))
    assert (local.memory.at, local.memory.shards) == ((1, 2), TABLE)


def test_a_table_that_comes_after_a_newer_memory_is_taken() -> None:
    """An order was sent again, and a heartbeat was faster."""
    local = LocalState()
    local.remember(memory(2, 5, told=False))
    local.remember(memory(1, 5, told=True))
    assert local.memory == memory(2, 5, told=True)
    local.remember(msg.JobMemory((1, 0), shards=(("b", 0, 1, 4),), shards_at=(1, 4)))
    assert local.memory == memory(2, 5, told=True), "that one is older"


def test_a_node_is_told_once_of_the_shards_and_the_next_controller_knows_them() -> None:
    many = ManyNodes(3, {"max_nodes": 3})
    many.run_an_epoch()
    for rank in many.ranks:
        many.core.take(ev.Registered(*many.of(rank), 0, f"shard {rank % 2}"))
    nodes = {node: LocalState() for node in (1, 2)}
    told = []
    for error in ("one", "two"):
        many.tell(ev.Faulted(*many.of(3), many.job.epoch, error))
        orders = [action.message for action in many.core.context.actions if isinstance(action, msg.Send)]
        for order in orders:
            assert isinstance(order, msg.Order)
            told.append(order.memory is not None and order.memory.shards is not None)
            nodes[order.link].remember(order.memory)
        many.run_an_epoch()
    assert told[:2] == [True, True]
    assert sum(told) == 2, "once for each node"
    reports = {node: local.report((0, 0)) for node, local in nodes.items()}
    config, members = many.job.state.config, {node: many.job.state.nodes[node] for node in (1, 2)}
    state, _ = rebuild(config, members, reports, cmd.Cause("node", None, "node 0 is gone"), 0.0)
    assert state.shards == {rank: f"shard {rank % 2}" for rank in many.ranks}


def test_a_table_of_as_many_shards_as_ranks_is_bounded() -> None:
    table = ShardTable()
    for rank in range(20_000):
        table.tell(rank, f"shard {rank}")
    for rank in range(20_000, 20_016):
        table.tell(rank, "replicated")
    assert len(table.packed()) == MAX_RUNS
    assert table.packed()[0] == ("replicated", 20_000, 1, 16), "what others have is worth more"
    assert table.packed() is table.packed()
    table.tell(5, "shard 5")
    version = table.version
    table.tell(5, "another")
    assert table.version == version + 1
