"""`scripts/gpu-check`: the GPU tests and the GPU benchmark, one table, one JSON file.

What needs several GPUs is left out on a machine with one, and that is said.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import harness

ROOT = Path(__file__).resolve().parents[1]
DEADLINE_S = 1500.0


def run_tests(directory: Path, chosen: list[str]) -> list[dict[str, Any]]:
    """A row for every test: its name, `passed`, `failed` or `skipped`, and its seconds."""
    report = directory / "tests.xml"
    arguments = ["tests/gpu", "-q", "-s", f"--junit-xml={report}", *chosen]
    subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, timeout=DEADLINE_S, check=False)
    if not report.exists():
        return [{"part": "tests", "name": "tests/gpu", "outcome": "failed", "seconds": 0.0}]
    rows = []
    for case in ET.parse(report).getroot().iter("testcase"):
        outcomes = {child.tag for child in case} & {"failure", "error", "skipped"}
        outcome = "skipped" if outcomes == {"skipped"} else "failed" if outcomes else "passed"
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        rows.append({"part": "tests", "name": name, "outcome": outcome, "seconds": float(case.get("time", "0"))})
    return rows


def run_benchmark(directory: Path, options: list[str]) -> tuple[bool, list[dict[str, Any]]]:
    """(whether every part ran to its end, the rows of `gpu.py`)."""
    path = directory / "gpu.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), f"--json={path}", *options]
    finished = subprocess.run(command, cwd=ROOT, timeout=DEADLINE_S, check=False)
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return finished.returncode == 0 and bool(rows), rows


def main() -> int:
    """Runs both; 0 when everything that could run passed."""
    parser = argparse.ArgumentParser(description="GPU tests and benchmark of hyperpodrun.")
    parser.add_argument("--quick", action="store_true", help="few faults and little state")
    parser.add_argument("--only", choices=["tests", "benchmark"], help="one half")
    parser.add_argument("-k", metavar="EXPRESSION", help="tests that match, as pytest's -k")
    parser.add_argument("--json", type=Path, default=Path("gpu-check.json"), metavar="FILE")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("gpu-check: there is no NVIDIA GPU here that this torch can use", file=sys.stderr)
        return 2
    count = torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as name:
        rows: list[dict[str, Any]] = []
        worked = True
        if args.only != "benchmark":
            rows += run_tests(Path(name), ["-k", args.k] if args.k else [])
        if args.only != "tests":
            worked, measured = run_benchmark(Path(name), ["--quick"] if args.quick else [])
            rows += measured
    tests = [row for row in rows if row["part"] == "tests"]
    lines = [[row["name"], row["outcome"], f"{row['seconds']:.1f}"] for row in tests]
    print(f"\n{torch.cuda.get_device_name()}, {count} GPU(s), torch {torch.__version__}, NCCL {nccl_version(torch)}")
    if lines:
        print(harness.table(["test", "outcome", "s"], lines))
    if count == 1:
        print("left out: a rank on each of several GPUs, as this machine has one")
    machine = {"part": "machine", "gpu": torch.cuda.get_device_name(), "gpus": count, "torch": torch.__version__}
    harness.write_rows(args.json, [machine, *rows])
    failed = sum(row["outcome"] == "failed" for row in tests)
    print(f"{failed} test(s) failed" if failed else "no test failed", f"; everything is in {args.json}", sep="")
    return 1 if failed or not worked else 0


def nccl_version(torch: Any) -> str:
    return ".".join(map(str, torch.cuda.nccl.version()))


if __name__ == "__main__":
    sys.exit(main())
