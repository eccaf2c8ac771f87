"""What the ranks of one run wrote into its trace (`testing/trace.py`) and printed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Digests = dict[str, str]


@dataclass
class RankRecord:
    """Of one rank. A step that was repeated has the digests of its last time."""

    steps: dict[int, Digests] = field(default_factory=dict)
    places: dict[int, list[str]] = field(default_factory=dict)
    """By step: where a fault could have fired."""
    results: dict[str, Digests] = field(default_factory=dict)
    """By name: what the script declared last."""
    fired: list[str] = field(default_factory=list)
    unregistered: dict[str, str] = field(default_factory=dict)
    """By path: what changed and is not registered, in a sentence."""
    lines: list[str] = field(default_factory=list)
    """What it printed."""

    @property
    def last_step(self) -> int:
        return max(self.steps, default=-1)

    def add(self, row: dict[str, Any]) -> None:
        if "step" in row:
            self.steps[row["step"]], self.places[row["step"]] = row["digests"], row["places"]
        elif "result" in row:
            self.results[row["result"]] = row["digests"]
        elif "fired" in row:
            self.fired.append(row["fired"])
        elif "unregistered" in row:
            self.unregistered.setdefault(row["path"], row["unregistered"])


def read_records(trace: Path, logs: Path) -> dict[int, RankRecord]:
    """By rank."""
    records: dict[int, RankRecord] = {}
    for path in sorted(trace.glob("rank-*.jsonl")):
        record = records.setdefault(int(path.stem.partition("-")[2]), RankRecord())
        for line in path.read_text(errors="replace").splitlines():
            try:
                record.add(json.loads(line))
            except ValueError:  # its process died while it wrote
                continue
    for path in sorted(logs.glob("*/attempt_*/*/stdout.log")):
        rank = int(path.parent.name)
        if rank in records:
            records[rank].lines += [line.rstrip() for line in path.read_text(errors="replace").splitlines()]
    return records


def errors_of(logs: Path) -> str:
    """The end of what every worker wrote to stderr."""
    paths = sorted(logs.glob("*/attempt_*/*/stderr.log"))
    return "\n".join(path.read_text(errors="replace")[-20_000:] for path in paths)


def recoveries_of(logs: Path) -> list[float]:
    """How long each recovery took, in seconds."""
    path = logs / "recoveries.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row["total_ms"] / 1e3 for row in rows if row["total_ms"] is not None]
