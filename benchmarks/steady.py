"""What being recoverable costs a step in which nothing fails: the example's own GPT, at its own sizes, two ranks.

Two equal models are trained in every process, one with a CheckpointManager and one without, in blocks of either kind
that alternate: a machine's speed drifts by more than what is to be measured. The figure is the median over the pairs of
blocks of the difference of their medians, with the interval that holds it with 95 %; its upper end counts. `--baseline
REV` measures another commit's code beside this one, launch by launch in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import harness


def launch(blocks: int, code: Path | None) -> list[dict[str, object]]:
    """The facts of one job: of each rank the pairs of medians, in microseconds."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        finished = harness.run(
            harness.command(
                "hyperpodrun",
                2,
                ["--inprocess-restart"],
                "steady_worker.py",
                f"--directory={name}",
                f"--blocks={blocks}",
            ),
            directory,
            deadline_s=600.0,
            environment=harness.importing_from(code),
        )
        harness.require_success(finished)
        facts = [json.loads(line) for line in (directory / "facts.jsonl").read_text().splitlines()]
    harness.require_code(facts, code)
    return facts


def median_with_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median and the ends of its 95 % interval, by order statistics: no assumption of a distribution."""
    ordered = sorted(values)
    count = len(ordered)
    reach = 0.98 * math.sqrt(count)  # 1.96 standard deviations of a binomial of one half
    low = max(0, math.floor(count / 2 - reach))
    high = min(count - 1, math.ceil(count / 2 + reach))
    return statistics.median(ordered), ordered[low], ordered[high]


def row_of(name: str, facts: Sequence[dict[str, object]]) -> dict[str, object]:
    """A rank's blocks are compared with its own; both ranks' pairs count."""
    pairs = [(float(plain), float(managed)) for fact in facts for plain, managed in fact["pairs"]]  # type: ignore[attr-defined]
    cost, low, high = median_with_interval([managed - plain for plain, managed in pairs])
    return {
        "benchmark": "steady",
        "code": name,
        "pairs": len(pairs),
        "step_us": statistics.median(plain for plain, _ in pairs),
        "cost_us": cost,
        "low_us": low,
        "high_us": high,
    }


def cells(row: dict[str, object]) -> list[str]:
    step, cost, low, high = (float(str(row[key])) for key in ("step_us", "cost_us", "low_us", "high_us"))
    interval = f"{cost:.0f} [{low:.0f}, {high:.0f}]"
    return [
        str(row["code"]),
        str(row["pairs"]),
        f"{step / 1e3:.2f}",
        interval,
        f"{cost / step:.2%}",
        f"{high / step:.2%}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="What being recoverable costs a step of the example.")
    parser.add_argument("--blocks", type=harness.positive, default=60, help="of either kind, in a launch (default: 60)")
    parser.add_argument("--launches", type=harness.positive, default=2, help="of either code (default: 2)")
    parser.add_argument("--baseline", metavar="REV", help="a commit to measure beside this code")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--quick", action="store_true", help="one small run: does it work at all?")
    args = parser.parse_args()
    if args.quick:
        args.blocks, args.launches = 3, 1
    print(f"steady: {harness.describe_machine()}\n", flush=True)
    try:
        with harness.checked_out(args.baseline) if args.baseline else contextlib.nullcontext() as baseline:
            codes = {"this": None, **({args.baseline: baseline} if baseline is not None else {})}
            facts: dict[str, list[dict[str, object]]] = {name: [] for name in codes}
            for number in range(args.launches):
                for name, code in codes.items():
                    harness.progress(f"launch {number + 1} of {args.launches}, {name}")
                    facts[name] += launch(args.blocks, code)
    except (harness.RunFailed, subprocess.CalledProcessError) as error:
        sys.exit(f"steady: {error}")
    rows = [row_of(name, found) for name, found in facts.items()]
    header = ["code", "pairs", "step, ms", "cost, us [95 %]", "of a step", "upper end"]
    print(harness.table(header, [cells(row) for row in rows]))
    harness.write_rows(args.json, rows)


if __name__ == "__main__":
    main()
