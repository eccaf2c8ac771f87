"""How long process groups take to come up, and what that costs the busiest process: our stores beside torch's TCPStore.

    gloo     real gloo groups in processes that are warm, on nodes that are network namespaces, a store's client kept
    warm     the same after a fault: one rank is a new process; torch's store is new, and dialled anew by all, as
             torchrun does it; ours is in another epoch
    groups   so many groups by `new_group` in one job
    replay   no gloo: clients ask what the ranks of a gloo group ask, so that thousands fit on one machine

Both stores are measured in turn in each round. TCPStore's server is torch's own, in a process that does nothing else;
beside it stand processes that are to an agent's store what an agent is, one for each node: its shards and its
transport are the real ones. Both get gloo's two switches for batched requests, which hyperpodrun sets and torchrun does
not. `busiest` is that server, or whichever of the agents had the most: requests, with messages between agents; bytes
both ways, as the kernel counts them; processor time. A replay that takes over 110 s is left, with what it had cost by
then. Latency is each way: of the network in `gloo` and `warm`, and in `replay` of messages between agents, and of the
ranks' ways to TCPStore, but for those on its node.

    python benchmarks/bootstrap.py [--quick] [--modes gloo,replay] [--replay 512:64,4096:64] [--json FILE] [--markdown]
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "stores"))

import harness
from meeting import Desk
from namespaces import Namespaces, why_not
from replay import LIMIT_S
from switch import SlowNamespaces

STORES = ("tcpstore", "rootless")
MODES = ("gloo", "warm", "groups", "replay")
PROGRAMS = Path(__file__).parent / "stores"
REQUESTS_OF_A_RANK = 3
"""As `replay.py` asks them: one SET, one WAIT, one MULTI_GET."""
_REPLAYED, _REPEATED, _BOOTSTRAPS, _BOOTSTRAPS_OF = 3, 5, 500, 4
_TIME_S = 200.0
_HEADER = ("mode", "ranks", "agents", "latency ms", "store", "median s", "p99 s", "requests", "bytes", "cpu s")
_began = time.monotonic()


@dataclass
class Measured:
    """What one store took in one case, by round."""

    seconds: list[float] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def row(self, store: str, mode: str, ranks: int, agents: int, latency_ms: float) -> dict[str, Any]:
        ordered = sorted(self.seconds)
        return {
            "benchmark": "bootstrap",
            "store": store,
            "mode": mode,
            "ranks": ranks,
            "agents": agents,
            "latency_ms": latency_ms,
            "median_s": round(harness.median(ordered) or 0.0, 5),
            "p99_s": round(ordered[-(-99 * len(ordered) // 100) - 1], 5),
            "busiest_requests": int(harness.median(self.requests) or 0),
            "busiest_bytes": int(harness.median(self.bytes) or 0),
            "busiest_cpu_s": round(harness.median(self.cpu_s) or 0.0, 4),
            "rounds": len(ordered),
        }


class Nodes:
    """The processes of one case: agents, TCPStore's server, and ranks or their replay."""

    def __init__(self, directory: Path, ranks: int, nodes: int, latency_ms: float, *, real: bool) -> None:
        self.ranks, self.nodes, self._latency_ms = ranks, nodes, latency_ms
        self._directory, self._real = directory, real
        self._output = directory / "output.txt"
        self._space: Namespaces | None = None
        if real and nodes > 1:
            self._space = SlowNamespaces(nodes, latency_ms) if latency_ms else Namespaces(nodes)
        self.desk = Desk(directory)
        self._processes: list[subprocess.Popen[Any]] = []
        self._epoch = 0
        self.agents = [("agent", node) for node in range(nodes)]
        self.all = [("rank", rank) for rank in range(ranks)]

    def start(self) -> None:
        """Everything is up and connected."""
        delay = 0.0 if self._real else self._latency_ms
        if self._space is None:
            self._run(0, "agents.py", self.desk.path, "127.0.0.1", delay, *range(self.nodes))
        for node in range(self.nodes if self._space is not None else 0):
            self._run(node, "agents.py", self.desk.path, self.host(node), delay, node)
        self._run(0, "root.py", self.desk.path)
        self.desk.meet(*self.agents, ("root",))
        up = [self.desk.hear(agent) for agent in self.agents]
        self._ports = [port for _, port in up]
        addresses = {node: address for node, (address, _) in enumerate(up)}
        self.desk.ask(self.agents, "peers", addresses)
        self.open_epoch()
        self._root_port = self.new_root()
        if not self._real:
            self._run(0, "replay.py", self.desk.path)
            self.desk.meet(("load",))
            return
        for node in range(self.nodes):
            self._run(node, "ranks.py", self.desk.path, node)
        self.desk.meet(*(("node", node) for node in range(self.nodes)))
        for node in range(self.nodes):
            self.fork([rank for rank in range(self.ranks) if self.node_of(rank) == node])
        for store in STORES:
            for rank in range(self.ranks):
                self.desk.tell(("rank", rank), "connect", store, *self.address(store, rank))
            for rank in self.all:
                self.desk.hear(rank)

    def _run(self, node: int, program: str, *arguments: object) -> None:
        command = [sys.executable, str(PROGRAMS / program), *map(str, arguments)]
        more = {
            "GLOO_ENABLE_STORE_V2_API": "1",
            "GLOO_ENABLE_RANK_AS_SEQUENCE_NUMBER": "1",
            "GLOO_SOCKET_IFNAME": "lo" if self._space is None else "eth0",
            "OMP_NUM_THREADS": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "RES_OPTIONS": "attempts:0",  # some look-ups of torch's client stall for seconds, with either store
        }
        if self._space is not None:
            self._space.start(node, command, self._output, more)
            return
        with self._output.open("ab") as output:
            process = subprocess.Popen(command, env={**os.environ, **more}, stdout=output, stderr=output)
        self._processes.append(process)

    def host(self, node: int) -> str:
        return "127.0.0.1" if self._space is None else self._space.address(node)

    def node_of(self, rank: int) -> int:
        return rank * self.nodes // self.ranks

    def address(self, store: str, rank: int) -> tuple[str, int]:
        """What a rank dials."""
        if store == "tcpstore":
            return self.host(0), self._root_port
        return "127.0.0.1", self._ports[self.node_of(rank)]

    def fork(self, ranks: Sequence[int]) -> None:
        node = ("node", self.node_of(ranks[0]))
        self.desk.ask([node], "fork", list(ranks))
        self.desk.meet(*(("rank", rank) for rank in ranks))

    def replace_last_rank(self) -> None:
        rank = self.ranks - 1
        self.desk.ask([("rank", rank)], "end")
        self.desk.forget(("rank", rank))
        self.fork([rank])

    def open_epoch(self) -> str:
        """The prefix of its keys."""
        self._epoch += 1
        self.desk.ask(self.agents, "open", self._epoch)
        return f"hyperpodrun-epoch-{self._epoch}"

    def new_root(self) -> int:
        (self._root_port,) = self.desk.ask([("root",)], "new")
        return int(self._root_port)

    def measure(self, store: str, into: Measured, action: Callable[[], float], requests: int) -> None:
        """One round: what `action` took, and what it cost the busiest process. `requests`: at TCPStore."""
        names = [("root",)] if store == "tcpstore" else self.agents
        before = self.desk.ask(names, "counters")
        into.seconds.append(action())
        after = self.desk.ask(names, "counters")
        spent = [[now - then for now, then in zip(*pair, strict=True)] for pair in zip(after, before, strict=True)]
        into.requests.append(requests if store == "tcpstore" else max(row[0] for row in spent))
        into.bytes.append(max(row[1] for row in spent))
        into.cpu_s.append(max(row[2] for row in spent))

    def bootstrap(self, store: str, prefix: str, connecting: Sequence[int] = ()) -> float:
        """From the beginning of all ranks to the end of the last one's first all-reduce."""
        begin = time.monotonic() + 0.02 + 0.002 * self.ranks
        for rank in range(self.ranks):
            address = self.address(store, rank) if rank in connecting else None
            self.desk.tell(("rank", rank), "bootstrap", store, prefix, self.ranks, begin, address)
        return _span([self.desk.hear(rank) for rank in self.all])

    def many_groups(self, store: str, prefix: str, count: int) -> float:
        return _span(self.desk.ask(self.all, "groups", store, prefix, self.ranks, count))

    def destroy(self) -> None:
        self.desk.ask(self.all, "destroy")

    def connect_load(self, store: str) -> None:
        latency_s = self._latency_ms / 1000 if store == "tcpstore" else 0.0
        places = [(*self.address(store, rank), latency_s if self.node_of(rank) else 0.0) for rank in range(self.ranks)]
        self.desk.ask([("load",)], "connect", places)

    def replay(self, prefix: str) -> float:
        (seconds,) = self.desk.ask([("load",)], "replay", prefix)
        return float(seconds)

    def said(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    def close(self) -> None:
        self.desk.close()
        if self._space is not None:
            self._space.close()
        for process in self._processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def running(ranks: int, nodes: int, latency_ms: float, *, real: bool) -> Iterator[Nodes]:
    with tempfile.TemporaryDirectory() as name:
        made = Nodes(Path(name), ranks, nodes, latency_ms, real=real)
        try:
            made.start()
            yield made
        except RuntimeError as error:
            raise harness.RunFailed(f"{error}\n{made.said()[-2000:]}") from error
        finally:
            made.close()


def gloo(nodes: Nodes, rounds: int) -> dict[str, Measured]:
    found = {store: Measured() for store in STORES}
    requests = REQUESTS_OF_A_RANK * nodes.ranks
    epoch = nodes.open_epoch()
    for number in range(-1, rounds):
        for store in STORES:
            prefix = f"{epoch}/{number + 1}"
            into = found[store] if number >= 0 else Measured()  # the first is for connections between agents
            nodes.measure(store, into, lambda s=store, p=prefix: nodes.bootstrap(s, p), requests)
            nodes.destroy()
        if _is_late() and number >= 0:
            break
    return found


def warm(nodes: Nodes, rounds: int) -> dict[str, Measured]:
    found = {store: Measured() for store in STORES}
    for number in range(rounds):
        for store in STORES:
            nodes.replace_last_rank()
            new = [nodes.ranks - 1]
            if store == "tcpstore":
                nodes.new_root()
                new = list(range(nodes.ranks))
            prefix = nodes.open_epoch() if store == "rootless" else f"restart-{number}"
            requests = REQUESTS_OF_A_RANK * nodes.ranks + 2 * len(new)
            nodes.measure(store, found[store], lambda s=store, p=prefix, n=new: nodes.bootstrap(s, p, n), requests)
            nodes.destroy()
        if _is_late():
            break
    return found


def groups(nodes: Nodes, rounds: int, count: int) -> dict[str, Measured]:
    found = {store: Measured() for store in STORES}
    members = sum(max(2, nodes.ranks >> (1 + number % 3)) for number in range(count))
    requests = REQUESTS_OF_A_RANK * (nodes.ranks + members)
    for _ in range(rounds):
        for store in STORES:
            prefix = nodes.open_epoch()
            nodes.measure(store, found[store], lambda s=store, p=prefix: nodes.many_groups(s, p, count), requests)
            nodes.destroy()
    return found


def replay(nodes: Nodes, rounds: int) -> dict[str, Measured]:
    found = {store: Measured() for store in STORES}
    requests = REQUESTS_OF_A_RANK * nodes.ranks
    for store in STORES:
        nodes.connect_load(store)
        for number in range(-1, rounds):
            prefix = nodes.open_epoch()
            into = found[store] if number >= 0 else Measured()  # the first is for connections between agents
            nodes.measure(store, into, lambda p=prefix: nodes.replay(p), requests)
            if into.seconds[-1] >= LIMIT_S:
                found[store] = into
                break
            if _is_late() and number >= 0:
                break
    return found


def _span(times: Sequence[tuple[float, float]]) -> float:
    return max(end for _, end in times) - min(begin for begin, _ in times)


def _is_late() -> bool:
    return _limited and time.monotonic() - _began > _TIME_S


_limited = True


def _size(text: str) -> tuple[int, int]:
    ranks, _, nodes = text.partition(":")
    found = harness.positive(ranks), harness.positive(nodes or "1")
    if found[0] % found[1]:
        raise argparse.ArgumentTypeError(f"{text}: the ranks do not divide among the nodes")
    return found


def cases(options: argparse.Namespace) -> Iterator[tuple[str, int, int, float]]:
    """(mode, ranks, nodes, latency) in turn; sizes that need many nodes only where there can be some."""
    missing = why_not()
    if missing is not None and any(mode != "replay" for mode in options.modes):
        print(f"skipped: gloo over several nodes: {missing}", flush=True)
    for mode in options.modes:
        for ranks, nodes in getattr(options, mode):
            if mode != "replay" and nodes > 1 and missing is not None:
                continue
            for latency_ms in options.latencies if nodes > 1 and mode != "groups" else (0.0,):
                yield mode, ranks, nodes, latency_ms


def measure(options: argparse.Namespace, mode: str, ranks: int, nodes: int, latency_ms: float) -> list[dict[str, Any]]:
    with running(ranks, nodes, latency_ms, real=mode != "replay") as case:
        if mode == "gloo":
            many = options.bootstraps if (ranks, nodes) == (_BOOTSTRAPS_OF, 1) else options.runs
            found = gloo(case, many)
        elif mode == "warm":
            found = warm(case, options.runs)
        elif mode == "groups":
            found = groups(case, 1, options.count)
        else:
            found = replay(case, min(options.runs, _REPLAYED))
    return [found[store].row(store, mode, ranks, nodes, latency_ms) for store in STORES]


def cells(row: dict[str, Any]) -> list[str]:
    return [
        row["mode"], str(row["ranks"]), str(row["agents"]), f"{row['latency_ms']:g}", row["store"],
        _seconds(row["median_s"]), _seconds(row["p99_s"]), str(row["busiest_requests"]), f"{row['busiest_bytes']:,}",
        f"{row['busiest_cpu_s']:.3f}",
    ]  # fmt: skip


def _seconds(value: float) -> str:
    return f"> {LIMIT_S:.0f}" if value >= LIMIT_S else f"{value:.4f}"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of docs/rootless.md."""
    when = datetime.datetime.now(datetime.timezone.utc).date()
    lines = [
        f"{when}, {harness.describe_machine()}.",
        "",
        f"| {' | '.join(_HEADER)} |",
        "|---|" + "---:|" * 3 + "---|" + "---:|" * 5,
    ]
    return "\n".join([*lines, *(f"| {' | '.join(cells(row))} |" for row in rows)])


def main() -> None:
    global _limited
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = harness.comma_separated(_size)
    parser.add_argument("--modes", type=harness.comma_separated(harness.one_of(MODES)), default=",".join(MODES))
    parser.add_argument("--gloo", type=sizes, default="4:1,8:1,16:2,64:8", metavar="RANKS:NODES,...")
    parser.add_argument("--warm", type=sizes, default="8:1,16:2", metavar="RANKS:NODES,...")
    parser.add_argument("--groups", type=sizes, default="8:1", metavar="RANKS:NODES,...")
    parser.add_argument("--replay", type=sizes, default="64:8,512:64", metavar="RANKS:AGENTS,...")
    parser.add_argument("--count", type=harness.positive, default=256, help="of groups, in that mode [256]")
    latencies = harness.comma_separated(float)
    parser.add_argument("--latencies", type=latencies, default="0,1,5", metavar="MS,...", help="each way [0,1,5]")
    parser.add_argument("--runs", type=harness.positive, default=_REPEATED, help=f"of each case [{_REPEATED}]")
    parser.add_argument("--bootstraps", type=harness.positive, default=_BOOTSTRAPS, help="of 4 ranks on one node [500]")
    parser.add_argument("--unlimited", action="store_true", help="all of it, however long that takes")
    parser.add_argument("--quick", action="store_true", help="one small case of each mode: does it work at all?")
    parser.add_argument("--markdown", action="store_true", help="print the table as docs/rootless.md has it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    options = parser.parse_args()
    _limited = not options.unlimited
    if options.quick:
        options.gloo = options.groups = [(2, 1)]
        options.warm, options.replay = [(4, 2)], [(16, 4)]
        options.latencies, options.runs, options.bootstraps, options.count = [1.0], 1, 2, 4
    print(harness.describe_machine(), flush=True)
    rows: list[dict[str, Any]] = []
    failed = False
    for mode, ranks, nodes, latency_ms in cases(options):
        if _is_late():
            harness.progress("the time is up; --unlimited measures the rest")
            break
        try:
            found = measure(options, mode, ranks, nodes, latency_ms)
        except harness.RunFailed as error:
            failed = True
            print(f"failed: {mode}, {ranks} ranks on {nodes} nodes, {latency_ms:g} ms: {error}", flush=True)
            continue
        rows += found
        for row in found:
            harness.progress("  ".join(cells(row)))
    print(markdown(rows) if options.markdown else harness.table(_HEADER, [cells(row) for row in rows]))
    harness.write_rows(options.json, rows)
    sys.exit(failed)


if __name__ == "__main__":
    main()
