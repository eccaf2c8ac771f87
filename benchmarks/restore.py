"""How fast a lost rank has its state again: from a peer's memory, beside a plain gloo send and beside disk.

One launch for every size and world size: its last rank is killed several times, then the same bytes are sent by gloo
and saved and loaded through a file in the page cache, all in one run. The last line is the cost of being recoverable
for a step in which nothing happens, the median of as many processes as there are runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import harness

SIZES = "10,100,1000,2000"
STEP_MS = 20.0


def launch(world_size: int, runs: int, *options: str) -> list[dict[str, float]]:
    """The facts of one job."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        finished = harness.run(
            harness.command(
                "hyperpodrun",
                world_size,
                ["--inprocess-restart"],
                "restore_worker.py",
                f"--directory={directory}",
                f"--runs={runs}",
                *options,
            ),
            directory,
            deadline_s=300.0,
        )
        harness.require_success(finished)
        return [json.loads(line) for line in (directory / "facts.jsonl").read_text().splitlines()]


def measure(world_size: int, nbytes: int, runs: int, options: Sequence[str]) -> list[dict[str, object]]:
    """A row for each path."""
    facts = launch(world_size, runs, f"--bytes={nbytes}", *options)
    rows: list[dict[str, object]] = []
    for path in ("peer", "gloo", "disk"):
        mine = [fact for fact in facts if fact["path"] == path and fact.get("received", True)]
        row: dict[str, object] = {
            "benchmark": "restore",
            "path": path,
            "bytes": nbytes,
            "world_size": world_size,
            "median_s": statistics.median(fact["seconds"] for fact in mine),
            "runs": len(mine),
        }
        if path == "peer":
            row["extra_mb"] = max(fact["extra_mb"] for fact in facts if fact["path"] == path)
        rows.append(row)
    return rows


def cost_of_a_step_us() -> float:
    """Of one process: the difference of the medians of 2,000 steps with a CheckpointManager, and 2,000 without."""
    (fact,) = launch(1, 1)
    return (fact["managed"] - fact["plain"]) * 1e6


def cells(rows: list[dict[str, object]]) -> list[str]:
    """A line of the table: bandwidths, and how the peer compares."""
    nbytes = float(str(rows[0]["bytes"]))
    seconds = {str(row["path"]): float(str(row["median_s"])) for row in rows}
    return [
        f"{nbytes / 1e6:.0f}",
        str(rows[0]["world_size"]),
        *(f"{nbytes / 1e9 / seconds[path]:.2f}" for path in ("peer", "gloo", "disk")),
        f"{seconds['gloo'] / seconds['peer']:.2f}",
        f"{seconds['disk'] / seconds['peer']:.1f}",
        f"{float(str(rows[0]['extra_mb'])):.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Restore from a peer's memory beside gloo and disk.")
    parser.add_argument("--runs", type=harness.positive, default=5, help="lost ranks per launch (default: 5)")
    parser.add_argument(
        "--sizes", type=harness.comma_separated(harness.positive), default=SIZES, metavar="MB,...", help=SIZES
    )
    parser.add_argument("--world-sizes", type=harness.comma_separated(harness.positive), default="2,4", metavar="N,...")
    parser.add_argument("--checksum", action="store_true", help="check every bucket")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--quick", action="store_true", help="one small run: does it work at all?")
    args = parser.parse_args()
    if args.quick:
        args.runs, args.sizes, args.world_sizes = 1, [10], [2]
    print(f"restore: {harness.describe_machine()}\n", flush=True)
    rows: list[dict[str, object]] = []
    lines: list[list[str]] = []
    try:
        for world_size in args.world_sizes:
            for size in args.sizes:
                harness.progress(f"{size} MB, {world_size} ranks")
                measured = measure(world_size, size * 1_000_000, args.runs, ["--checksum"] if args.checksum else [])
                rows += measured
                lines.append(cells(measured))
        costs_us = [cost_of_a_step_us() for _ in range(args.runs)]
    except harness.RunFailed as error:
        sys.exit(f"restore: {error}")
    cost_us = statistics.median(costs_us)
    rows.append(
        {"benchmark": "restore", "path": "steady", "world_size": 1, "median_s": cost_us / 1e6, "runs": len(costs_us)}
    )
    header = ["MB", "ranks", "peer, GB/s", "gloo, GB/s", "disk, GB/s", "peer/gloo", "peer/disk", "extra, MB"]
    print(harness.table(header, lines))
    print(
        f"\nbeing recoverable costs a step {cost_us:.0f} us [{min(costs_us):.0f}, {max(costs_us):.0f}]: "
        f"{cost_us / 1e3 / STEP_MS:.2%} of one that takes {STEP_MS:g} ms"
    )
    harness.write_rows(args.json, rows)


if __name__ == "__main__":
    main()
