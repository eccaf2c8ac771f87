"""`python -m hyperpodrun.simulation [FROM] TO`: plays random schedules; a counterexample is shrunk and printed."""

from __future__ import annotations

import sys

from .rules import Violation
from .schedule import Schedule, random_schedule
from .world import World, shrunk


def _broken(schedule: Schedule) -> str:
    try:
        World(schedule).play()
    except Violation as violation:
        return str(violation)
    return ""


def main(arguments: list[str]) -> int:
    """0 if no rule was broken."""
    first, last = (0, int(arguments[0])) if len(arguments) == 1 else map(int, arguments[:2])
    found = 0
    for seed in range(first, last):
        schedule = random_schedule(seed)
        why = _broken(schedule)
        if why:
            found += 1
            print(f"# seed {seed}: {why}\n{shrunk(schedule, lambda other: bool(_broken(other))).text()}")
    print(f"{last - first} schedules, {found} broke a rule")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
