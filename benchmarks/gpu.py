"""Recovery on GPUs: several NCCL ranks that lose one of theirs, beside torchrun with the same job in the same run.

    python benchmarks/gpu.py [--faults 10] [--restarts 50] [--restore-mb 8000] [--ranks 4] [--json FILE]

All ranks are on the first GPU, which makes steps slow and is all right for what is measured here: from a fault to the
next step on the last rank, exceptions and SIGKILL, with torch.compile and without; what fifty restarts in process leave
behind; and how fast a lost rank has 8 GB of state again, beside a broadcast and a send of the same bytes. Where there
are several GPUs, recovery is measured also with a rank on each, and the restore between two. On a machine without a GPU
it runs on the CPU with gloo, to see whether the benchmark works.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import harness
from harness import RunFailed

DEADLINE_S = 280.0
ONE_GPU = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]}
FLAT = ("fds", "threads", "allocated_mb", "reserved_mb", "device_used_mb")
"""What must not grow from restart to restart."""


class Job:
    """One launch of `gpu_worker.py`: its faults, what came after them, and the launcher's own report."""

    def __init__(
        self, launcher: str, ranks: int, fault: str, faults: int, *, compiled: bool = False, spread: bool = False
    ) -> None:
        """`spread`: over all GPUs, else on the first one."""
        directory = Path(tempfile.mkdtemp(prefix="gpu-"))
        options = ["--inprocess-restart"] if launcher == "hyperpodrun" else [f"--max-restarts={faults}"]
        arguments = [f"--directory={directory}", f"--fault={fault}", f"--faults={faults}"]
        arguments += ["--inprocess"] if launcher == "hyperpodrun" else []
        arguments += ["--compile"] if compiled else []
        options += [f"--log-dir={directory / 'logs'}"]
        try:
            line = harness.command(launcher, ranks, options, "gpu_worker.py", *arguments)
            environment = {} if spread else ONE_GPU
            finished = harness.run(line, directory, deadline_s=DEADLINE_S, environment=environment)
            harness.require_success(finished)
            self.output = finished.output
            self._facts: dict[str, dict[int, dict[int, Any]]] = defaultdict(lambda: defaultdict(dict))
            for path in directory.glob("*.json"):
                row = json.loads(path.read_text())
                self._facts[row["fact"]][row["attempt"]][row["rank"]] = row
            report = directory / "logs" / "recoveries.jsonl"
            lines = report.read_text().splitlines() if report.exists() else []
            self.recoveries: list[dict[str, Any]] = [json.loads(text) for text in lines]
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        self.ranks, self.faults = ranks, faults

    def recovery_seconds(self) -> list[float]:
        """For every fault: until the last rank's first step after it. Raises RunFailed when one is missing."""
        seconds = []
        for attempt in range(self.faults):
            fault, after = self._facts["fault"][attempt], self._facts["stepped"][attempt + 1]
            if len(fault) != 1 or len(after) != self.ranks:
                raise RunFailed(f"attempt {attempt}: {len(fault)} faults, {len(after)} of {self.ranks} ranks went on")
            begin = next(iter(fault.values()))["ns"]
            seconds.append((max(row["ns"] for row in after.values()) - begin) / 1e9)
        return seconds

    def phases_ms(self) -> dict[str, float]:
        """Medians over the recoveries, as the launcher reports them."""
        rows = [row["phases_ms"] for row in self.recoveries if row["completed"]]
        return {name: statistics.median(row[name] or 0.0 for row in rows) for name in rows[0]} if rows else {}

    def resources(self, rank: int) -> list[dict[str, int]]:
        """By attempt; some lack it, as a rank can hear of the fault before it has told."""
        attempts = self._facts["resources"]
        return [attempts[attempt][rank] for attempt in sorted(attempts) if rank in attempts[attempt]]

    def error_lines(self) -> list[str]:
        """What NCCL, CUDA or torch's C++ code complained about."""
        signs = ("NCCL WARN", "NCCL ERROR", "CUDA error", "[E", "Watchdog", "watchdog", "terminate called")
        return [line for line in self.output.splitlines() if any(sign in line for sign in signs)]


def recovery(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every launcher, fault and mode. torchrun is not asked to compile: it would do all of it anew."""
    few = min(args.faults, args.few_faults)
    rows = []
    for fault in ("raise", "kill"):
        rows.append(recovery_of("hyperpodrun", args.ranks, fault, args.faults))
        rows.append(recovery_of("torchrun", args.ranks, fault, few))
    rows.append(recovery_of("hyperpodrun", args.ranks, "raise", args.faults, compiled=True))
    rows.append(recovery_of("hyperpodrun", args.ranks, "kill", few, compiled=True))
    return rows


def recovery_on_several(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The same with a rank on each GPU."""
    few = min(args.faults, args.few_faults)
    rows = []
    for fault in ("raise", "kill"):
        rows.append(recovery_of("hyperpodrun", args.gpus, fault, args.faults, spread=True))
        rows.append(recovery_of("torchrun", args.gpus, fault, few, spread=True))
    return rows


def recovery_of(
    launcher: str, ranks: int, fault: str, faults: int, *, compiled: bool = False, spread: bool = False
) -> dict[str, Any]:
    """One launcher's row."""
    name = f"{launcher}, {fault}, {'compiled' if compiled else 'eager'}, {ranks} ranks"
    row: dict[str, Any] = {
        "benchmark": "gpu", "part": "several GPUs" if spread else "recovery", "launcher": launcher, "fault": fault,
        "compiled": compiled, "world_size": ranks, "median_s": None, "runs": [],
    }  # fmt: skip
    try:
        job = Job(launcher, ranks, fault, faults, compiled=compiled, spread=spread)
        row["runs"] = job.recovery_seconds()
        row["median_s"] = statistics.median(row["runs"])
        row["phases_ms"], row["error_lines"] = job.phases_ms(), job.error_lines()
        harness.progress(f"{name}: {row['median_s']:.3f} s")
    except RunFailed as error:
        row["error"] = str(error)
        harness.progress(f"{name}: FAILED: {error}")
    return row


def restarts(args: argparse.Namespace) -> dict[str, Any]:
    """What many restarts in process leave behind: after the fifth and after the last."""
    row: dict[str, Any] = {"benchmark": "gpu", "part": "restarts", "restarts": args.restarts, "world_size": args.ranks}
    try:
        job = Job("hyperpodrun", args.ranks, "raise", args.restarts)
        row["median_s"] = statistics.median(job.recovery_seconds())
        row["error_lines"] = job.error_lines()
        for rank in range(args.ranks):
            held = job.resources(rank)
            early = held[min(5, len(held) - 1)]
            row[f"rank{rank}"] = {name: [early[name], held[-1][name]] for name in FLAT if name in early}
        row["peak_mb"] = [held["peak_mb"] for held in job.resources(0) if "peak_mb" in held]
    except RunFailed as error:
        row["error"] = str(error)
    return row


def restore(args: argparse.Namespace, *, spread: bool = False) -> list[dict[str, Any]]:
    """A lost rank's state, beside a broadcast and a send of the same bytes. `spread`: the two ranks have a GPU each."""
    part = "restore on several GPUs" if spread else "restore"
    directory = Path(tempfile.mkdtemp(prefix="gpu-"))
    try:
        arguments = [f"--directory={directory}", f"--bytes={args.restore_mb * 1_000_000}", f"--device={args.device}"]
        arguments += ["--runs=3", "--broadcast"]
        line = harness.command("hyperpodrun", 2, ["--inprocess-restart"], "restore_worker.py", *arguments)
        environment = {} if spread else ONE_GPU
        finished = harness.run(line, directory, deadline_s=DEADLINE_S, environment=environment)
        harness.require_success(finished)
        facts = [json.loads(text) for text in (directory / "facts.jsonl").read_text().splitlines()]
    except RunFailed as error:
        return [{"benchmark": "gpu", "part": part, "error": str(error)}]
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    rows = []
    for path in ("peer", "broadcast", "send"):
        seconds = [fact["seconds"] for fact in facts if fact["path"] == path and fact.get("received", True)]
        row = {"benchmark": "gpu", "part": part, "path": path, "bytes": args.restore_mb * 1_000_000}
        rows.append({**row, "median_s": statistics.median(seconds), "runs": seconds})
    return rows


def print_recovery(rows: list[dict[str, Any]]) -> None:
    lines = []
    for row in rows:
        peers = [other for other in rows if other["launcher"] == "torchrun" and other["fault"] == row["fault"]]
        ratio = harness.ratio(peers[0]["runs"], row["runs"]) if peers and row["launcher"] == "hyperpodrun" else ""
        mode = "compiled" if row["compiled"] else "eager"
        cells = [row["launcher"], row["fault"], mode, str(len(row["runs"])), harness.spread(row["runs"]), ratio]
        lines.append(cells)
    print(harness.table(["launcher", "fault", "mode", "faults", "fault to next step, s", "ratio"], lines))
    ours = [row for row in rows if row.get("phases_ms")]
    if ours:
        names = list(ours[0]["phases_ms"])
        cells_of = [
            [row["fault"], "compiled" if row["compiled"] else "eager", *(f"{row['phases_ms'][n]:.1f}" for n in names)]
            for row in ours
        ]
        print("\nphases of hyperpodrun's recoveries, medians in ms")
        print(harness.table(["fault", "mode", *names], cells_of))


def print_restarts(row: dict[str, Any]) -> None:
    print(f"\n{row['restarts']} restarts in process, after the fifth -> after the last")
    if "error" in row:
        print(f"failed: {row['error']}")
        return
    ranks = [name for name in row if name.startswith("rank")]
    names = [name for name in FLAT if name in row[ranks[0]]]
    cells = [[rank, *("{} -> {}".format(*row[rank][name]) for name in names)] for rank in ranks]
    print(harness.table(["rank", *names], cells))
    print(f"recovery {row['median_s']:.3f} s (median); {len(row['error_lines'])} lines of NCCL or CUDA errors")
    for line in row["error_lines"][:5]:
        print(f"    {line}")


def print_restore(rows: list[dict[str, Any]]) -> None:
    print("\nstate of a lost rank")
    for row in rows:
        if "error" in row:
            print(f"failed: {row['error']}")
        else:
            print(f"{row['path']}: {row['bytes'] / 1e9:.2f} GB in {row['median_s']:.2f} s, "
                  f"{row['bytes'] / 1e9 / row['median_s']:.2f} GB/s")  # fmt: skip
    peer, *others = [row for row in rows if "error" not in row] or [{}]
    for row in others:
        print(f"peer/{row['path']}: {row['median_s'] / peer['median_s']:.2f} of its bandwidth")


def main() -> int:
    """Runs everything, prints the tables."""
    parser = argparse.ArgumentParser(description="Recovery on GPUs beside torchrun.")
    parser.add_argument("--ranks", type=harness.positive, default=4)
    parser.add_argument("--faults", type=harness.positive, default=10, help="faults of each kind (default: 10)")
    parser.add_argument("--few-faults", type=harness.positive, default=3, help="where each takes long (default: 3)")
    parser.add_argument("--restarts", type=harness.positive, default=50, help="restarts in one process (default: 50)")
    parser.add_argument("--restore-mb", type=harness.positive, default=8000, help="state to restore (default: 8000)")
    parser.add_argument("--parts", type=harness.comma_separated(str), default="recovery,restarts,restore,several")
    parser.add_argument("--quick", action="store_true", help="a few faults and little state: does it work at all?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    args = parser.parse_args()
    if args.quick:
        args.faults, args.few_faults, args.restarts, args.restore_mb = 2, 1, 6, 100
    import torch

    args.device, args.gpus = ("cuda" if torch.cuda.is_available() else "cpu"), torch.cuda.device_count()
    where = torch.cuda.get_device_name() if args.device == "cuda" else "no GPU: gloo on the CPU"
    print(f"gpu: {where}, {args.gpus} GPU(s), {args.ranks} ranks, {harness.describe_machine()}\n")
    rows: list[dict[str, Any]] = []
    if "recovery" in args.parts:
        rows += recovery(args)
        print_recovery(rows)
    if "restarts" in args.parts:
        rows.append(restarts(args))
        print_restarts(rows[-1])
    if "restore" in args.parts:
        restored = restore(args)
        rows += restored
        print_restore(restored)
    if "several" in args.parts:
        print("\na rank on each of several GPUs")
        if args.gpus > 1:
            several = recovery_on_several(args)
            rows += several
            print_recovery(several)
            restored = restore(args, spread=True)
            rows += restored
            print_restore(restored)
        else:
            print("left out: there are not several GPUs here")
    harness.write_rows(args.json, rows)
    failed = sum("error" in row for row in rows)
    print(f"\n{failed} part(s) failed" if failed else "\nevery part ran to its end")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
