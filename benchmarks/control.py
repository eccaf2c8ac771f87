"""What one recovery costs the control plane: messages, bytes, processor time, on 10 to 10,000 simulated agents.

The agents' decisions are the real ones (`control/node.py`), their network and workers are simulated in virtual time:
one hop takes 0.2 to 1.2 ms, a worker unwinds in 10 to 30 ms. A worker of a running epoch raises; the recovery is over
when every rank has completed a step in the next epoch. `cpu_s` is what the controller's agent needed for it, encoding
and decoding included, sockets not; `longest_s` is the longest that its event loop was held by one event: what is said
meanwhile waits, heartbeats too. The peers have nothing to compare: torchrun's agents poll a store.

    python benchmarks/control.py [--quick] [--agents 10,100,1000] [--json FILE]     (10,000 take long)
"""

from __future__ import annotations

import argparse
import functools
import gc
from collections import defaultdict
from pathlib import Path

import harness
from hyperpodrun.control.membership.leading.leader import Leader
from hyperpodrun.control.membership.messages import NodeEvent
from hyperpodrun.simulation.agents import SimulatedAgent
from hyperpodrun.simulation.schedule import Schedule
from hyperpodrun.simulation.world import World

_STEPS = 1_000_000
_STEP_S = 0.25


def measure(agents: int) -> dict[str, object]:
    """One recovery."""
    schedule = Schedule(seed=1, nodes=agents, workers=1, steps=_STEPS, step_time=_STEP_S, jitter=0.001)
    world = World(schedule, check=False)
    world.run(600.0, lambda: world.running[_founder(world), 0] == agents)
    world.run(world.now + 2 * _STEP_S + 0.1)  # everybody has completed a step
    before = world.messages
    gc.collect()
    gc.freeze()  # one controller's garbage is not looked for among ten thousand agents
    world.count_bytes, world.bytes = True, 0
    longest = _watch_decisions(world)
    began = world.now
    victim = next(iter(world.agents[agents // 2].workers.values()))
    victim.fault("RuntimeError: injected")
    world.run(began + 60.0, lambda: _stepped(world, agents))
    gc.unfreeze()
    leader = next(agent for agent in world.agents if isinstance(agent.node.role, Leader))
    if not _stepped(world, agents):
        raise SystemExit(f"the recovery of {agents} agents did not end")
    return {
        "benchmark": "control",
        "agents": agents,
        "messages": world.messages - before,
        "bytes": world.bytes,
        "cpu_s": round(world.cpu_s.get(leader.address, 0.0), 4),
        "longest_s": round(longest[leader.address], 4),
        "cpu_s_all_agents": round(sum(world.cpu_s.values()), 4),
        "virtual_s": round(world.now - began, 4),
    }


def _watch_decisions(world: World) -> defaultdict[str, float]:
    """By agent, the longest that it takes for one event: to decide, and to encode what it says."""
    longest: defaultdict[str, float] = defaultdict(float)
    handle = SimulatedAgent.handle

    def watched(agent: SimulatedAgent, event: NodeEvent) -> None:
        before = world.cpu_s.get(agent.address, 0.0)
        handle(agent, event)
        longest[agent.address] = max(longest[agent.address], world.cpu_s.get(agent.address, 0.0) - before)

    for agent in world.agents:
        agent.handle = functools.partial(watched, agent)  # type: ignore[method-assign]
    return longest


def _founder(world: World) -> str:
    return world.agents[0].founder


def _stepped(world: World, agents: int) -> bool:
    role = world.agents[0].node.role
    done = world.stepped[_founder(world), 1]
    return isinstance(role, Leader) and done == agents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", default="10,100,1000", help="how many, with commas between")
    parser.add_argument("--quick", action="store_true", help="10 and 100 agents only")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    counts = [10, 100] if arguments.quick else [int(text) for text in arguments.agents.split(",")]
    rows = []
    print(
        f"{'agents':>7} {'messages':>9} {'per agent':>9} {'bytes':>11} {'controller cpu s':>16} {'longest s':>9} "
        f"{'virtual s':>9}"
    )
    for agents in counts:
        row = measure(agents)
        rows.append(row)
        per_agent = int(str(row["messages"])) / agents
        print(
            f"{agents:>7} {row['messages']:>9} {per_agent:>9.1f} {row['bytes']:>11} {row['cpu_s']:>16} "
            f"{row['longest_s']:>9} {row['virtual_s']:>9}",
            flush=True,
        )
    harness.write_rows(arguments.json, rows)


if __name__ == "__main__":
    main()
