"""How fast a lost rank has its state again: from a peer's memory, beside a plain gloo send and beside disk.

For every size and world size, in each launch: its last rank is killed several times, then the same bytes are sent by
gloo, between buffers that are there, and saved and loaded through a file in the page cache. The peer's clock runs from
the call of `restore` to the last byte in its place, in a process that is new.
`--baseline REV` does the same with another commit's code, launch by launch in turn; both have the gloo and disk of all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import harness

SIZES = "10,100,1000"


def launch(world_size: int, runs: int, *options: str, code: Path | None = None) -> list[dict[str, object]]:
    """The facts of one job, with the package in the directory `code` instead of this one."""
    environment = harness.importing_from(code)
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
            environment=environment,
        )
        harness.require_success(finished)
        facts = [json.loads(line) for line in (directory / "facts.jsonl").read_text().splitlines()]
    harness.require_code(facts, code)
    return facts


def measure(
    world_size: int, nbytes: int, runs: int, rounds: int, options: Sequence[str], baseline: Path | None
) -> list[dict[str, object]]:
    """A row for each path: peer, gloo, disk and, with a baseline, the peer as that has it."""
    peer: dict[str, list[dict[str, object]]] = {"peer": []}
    rest: list[dict[str, object]] = []
    codes: dict[str, Path | None] = {"peer": None} | ({"baseline": baseline} if baseline is not None else {})
    for _ in range(rounds):
        for path, code in codes.items():
            facts = launch(world_size, runs, f"--bytes={nbytes}", *options, code=code)
            peer.setdefault(path, []).extend(fact for fact in facts if fact["path"] == "peer")
            rest += [fact for fact in facts if fact["path"] != "peer"]
    measured = {
        "peer": peer["peer"],
        "gloo": [fact for fact in rest if fact["path"] == "gloo"],
        "disk": [fact for fact in rest if fact["path"] == "disk"],
        **({"baseline": peer["baseline"]} if baseline is not None else {}),
    }
    rows: list[dict[str, object]] = []
    for path, facts in measured.items():
        seconds = sorted(float(str(fact["seconds"])) for fact in facts if fact.get("received", True))
        row: dict[str, object] = {
            "benchmark": "restore",
            "path": path,
            "bytes": nbytes,
            "world_size": world_size,
            "median_s": statistics.median(seconds),
            "fastest_s": seconds[0],
            "slowest_s": seconds[-1],
            "runs": len(seconds),
        }
        if path in peer:
            row["extra_mb"] = max(float(str(fact["extra_mb"])) for fact in facts)
        rows.append(row)
    return rows


def cells(rows: list[dict[str, object]]) -> list[str]:
    """A line of the table: bandwidths as median [slowest, fastest], and how the peer compares."""
    gigabytes = float(str(rows[0]["bytes"])) / 1e9
    by_path = {str(row["path"]): row for row in rows}

    def seconds(path: str, which: str = "median_s") -> float:
        return float(str(by_path[path][which]))

    def bandwidth(path: str) -> str:
        median, slowest, fastest = (
            gigabytes / seconds(path, f"{which}_s") for which in ("median", "slowest", "fastest")
        )
        return f"{median:.2f} [{slowest:.2f}, {fastest:.2f}]"

    others = [path for path in by_path if path != "peer"]
    return [
        f"{gigabytes * 1e3:.0f}",
        str(rows[0]["world_size"]),
        str(rows[0]["runs"]),
        *(bandwidth(path) for path in by_path),
        *(f"{seconds(path) / seconds('peer'):.2f}" for path in others),
        f"{float(str(rows[0]['extra_mb'])):.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Restore from a peer's memory beside gloo and disk.")
    parser.add_argument("--runs", type=harness.positive, default=5, help="lost ranks per launch (default: 5)")
    parser.add_argument(
        "--sizes", type=harness.comma_separated(harness.positive), default=SIZES, metavar="MB,...", help=SIZES
    )
    parser.add_argument("--world-sizes", type=harness.comma_separated(harness.positive), default="2,4", metavar="N,...")
    parser.add_argument("--baseline", metavar="REV", help="a commit to measure beside this code, launch by launch")
    parser.add_argument(
        "--rounds", type=harness.positive, help="launches for each figure (default: 1; 3 with a baseline)"
    )
    parser.add_argument("--checksum", action="store_true", help="check every bucket")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--quick", action="store_true", help="one small run: does it work at all?")
    args = parser.parse_args()
    if args.quick:
        args.runs, args.sizes, args.world_sizes = 1, [10], [2]
    print(f"restore: {harness.describe_machine()}\n", flush=True)
    rows: list[dict[str, object]] = []
    lines: list[list[str]] = []
    rounds = args.rounds or (3 if args.baseline else 1)
    options = ["--checksum"] if args.checksum else []
    try:
        with harness.checked_out(args.baseline) if args.baseline else contextlib.nullcontext() as baseline:
            for world_size in args.world_sizes:
                for size in args.sizes:
                    harness.progress(f"{size} MB, {world_size} ranks")
                    measured = measure(world_size, size * 1_000_000, args.runs, rounds, options, baseline)
                    rows += measured
                    lines.append(cells(measured))
                    harness.progress("  ".join(lines[-1]))
    except (harness.RunFailed, subprocess.CalledProcessError) as error:
        sys.exit(f"restore: {error}")
    paths = ["peer", "gloo", "disk", *(["baseline"] if args.baseline else [])]
    header = ["MB", "ranks", "runs", *(f"{path}, GB/s" for path in paths)]
    header += [*(f"peer/{path}" for path in paths[1:]), "extra, MB"]
    print(harness.table(header, lines))
    harness.write_rows(args.json, rows)


if __name__ == "__main__":
    main()
