"""The benchmark of bootstraps runs, measures both stores in each mode, and says it in rows of the agreed shape."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "bootstrap.py"
FIELDS = [
    "benchmark", "store", "mode", "ranks", "agents", "latency_ms", "median_s", "p99_s",
    "busiest_requests", "busiest_bytes", "busiest_cpu_s", "rounds",
]  # fmt: skip


def test_it_compares_both_stores_with_gloo_and_without(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    command = [sys.executable, str(BENCHMARK), "--quick", "--modes=gloo,replay", "--markdown", f"--json={path}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = json.loads(path.read_text())
    expected = [("gloo", 2, 1, 0.0), ("gloo", 2, 1, 0.0), ("replay", 16, 4, 1.0), ("replay", 16, 4, 1.0)]
    assert [(row["mode"], row["ranks"], row["agents"], row["latency_ms"]) for row in rows] == expected
    assert [row["store"] for row in rows] == ["tcpstore", "rootless"] * 2
    for row in rows:
        assert list(row) == FIELDS
        assert row["benchmark"] == "bootstrap"
        assert 0 < row["median_s"] <= row["p99_s"]
        assert row["busiest_requests"] >= row["ranks"] / row["agents"] * 2
        assert row["busiest_bytes"] > 0
    assert [row["busiest_requests"] for row in rows[::2]] == [3 * 2, 3 * 16]
    assert ended.stdout.count("\n| gloo | 2 | 1 | 0 |") == 2, "the table"
