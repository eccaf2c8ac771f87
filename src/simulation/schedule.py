"""What goes wrong in one simulated job, as a value and as text: a counterexample is a file that can be run again.

seed=7 nodes=4 spares=1 workers=2 in_process=1 max_restarts=3 steps=12
at 1.250 kill-agent 2
at 1.300 raise 5
at 4.000 cut 1 for 9.000
"""

from __future__ import annotations

import random

import msgspec

KINDS = (
    "raise", "kill-worker", "kill-agent", "restart-agent", "kill-leader", "cut", "deaf", "halve", "freeze", "reset",
    "signal", "slow", "restart-many", "cut-many",
)  # fmt: skip
"""`reset`: the connections of a node close, and nobody has died. `halve`: the first half is cut from the others.
`deaf`: a node is heard and hears nothing. `freeze`: an agent stands still, and then hears all at once; its workers go
on. `slow`: it does so again and again, for 20 ms in every 1.3 s. `restart-many`: as many agents as `target` says are
killed at once, the lowest first, and come back one after the other. `cut-many`: so many of the lowest are cut off."""


COMES_LATER_S = 0.1
"""Of agents that are killed at once, each comes back so much later than the one before."""


class Fault(msgspec.Struct, frozen=True):
    """`target` is a node, a rank, or how many nodes; taken modulo how many there are.

    `seconds`: until it heals or is started again.
    """

    at: float
    kind: str
    target: int = 0
    seconds: float = 0.0


class Schedule(msgspec.Struct, frozen=True):
    """One simulated job: how it is made, and its faults in order of time."""

    seed: int = 0
    nodes: int = 3
    spares: int = 0
    workers: int = 1
    min_nodes: int = 0
    """0: as many as there are."""
    in_process: bool = True
    max_restarts: int = 20
    steps: int = 12
    step_time: float = 0.25
    loss: float = 0.0
    duplicates: float = 0.0
    jitter: float = 0.002
    join_timeout: float = 60.0
    hole_timeout: float = 15.0
    """How long a lost node's place waits for another."""
    faults: tuple[Fault, ...] = ()

    @property
    def faults_over(self) -> float:
        """When everything has healed and everybody who comes back has been started."""
        total = self.nodes + self.spares
        lasts = ((f, COMES_LATER_S * (f.target % total) if f.kind == "restart-many" else 0.0) for f in self.faults)
        return max((fault.at + fault.seconds + later for fault, later in lasts), default=0.0)

    def text(self) -> str:
        """As a scenario file."""
        shown = [f"{name}={_number(getattr(self, name))}" for name in self.__struct_fields__ if name != "faults"]
        lines = [" ".join(shown)]
        for fault in self.faults:
            healed = f" for {fault.seconds:.10g}" if fault.seconds else ""
            lines.append(f"at {fault.at:.10g} {fault.kind} {fault.target}{healed}")
        return "\n".join(lines) + "\n"


def parse(text: str) -> Schedule:
    """A scenario file. Raises ValueError for a line that is not in the language."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    values = dict(item.split("=") for item in lines[0].split())
    kinds = {field.name: field.type for field in msgspec.structs.fields(Schedule)}
    made = {name: bool(int(value)) if kinds[name] is bool else kinds[name](value) for name, value in values.items()}
    faults = []
    for line in lines[1:]:
        match line.split():
            case ["at", at, kind, target] if kind in KINDS:
                faults.append(Fault(float(at), kind, int(target)))
            case ["at", at, kind, target, "for", seconds] if kind in KINDS:
                faults.append(Fault(float(at), kind, int(target), float(seconds)))
            case _:
                raise ValueError(f"not in the language of schedules: {line!r}")
    return Schedule(**made, faults=tuple(faults))


def random_schedule(seed: int) -> Schedule:
    """Up to five faults, often close together: a second one in the middle of what the first one has caused.

    One membership in thirty is large.
    """
    dice = random.Random(seed)
    large = dice.random() < 1 / 30
    nodes = dice.randrange(20, 59) if large else dice.choice([1, 2, 2, 3, 3, 3, 4, 5])
    spares = dice.choice([0, 0, 1, 1, 2])
    faults = []
    at = dice.uniform(0.0, 3.0)
    for _ in range(dice.randrange(6)):
        kind = dice.choice(KINDS)
        seconds = dice.choice([0.0, dice.uniform(0.1, 4.0), dice.uniform(4.0, 15.0)])
        if kind in ("cut", "deaf", "halve", "freeze", "restart-agent", "reset", "slow", "restart-many", "cut-many"):
            seconds = seconds or dice.uniform(0.1, 10.0)
        faults.append(Fault(round(at, 6), kind, dice.randrange(60 if large else 16), round(seconds, 3)))
        at += 10 ** dice.uniform(-3.5, 1.0)
    lossy = dice.random() < 0.4
    return Schedule(
        seed=seed,
        nodes=nodes,
        spares=spares,
        workers=dice.choice([1, 1, 2]),
        min_nodes=dice.choice([0, 0, max(1, nodes // 2 if large else nodes - 1)]),
        in_process=dice.random() < 0.8,
        steps=dice.choice([8, 24, 60]),
        hole_timeout=dice.choice([15.0, 45.0]),
        loss=dice.choice([0.01, 0.1]) if lossy else 0.0,
        duplicates=dice.choice([0.0, 0.05]),
        jitter=dice.choice([0.0005, 0.002, 0.05]),
        faults=tuple(faults),
    )


def _number(value: object) -> object:
    return int(value) if isinstance(value, bool) else value
