"""The benchmarks run, verify what they ran, and say it in rows of the agreed shape. Times do not matter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def quick_rows(name: str, directory: Path, *options: str) -> list[dict[str, Any]]:
    """The rows of one benchmark, run quickly with two ranks."""
    path = directory / "rows.json"
    ended = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--world-sizes=2", f"--json={path}", *options],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows


def test_a_benchmark_is_over_within_its_time_unless_it_is_told_how_often_to_measure(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import harness

    clock = [harness._BEGAN + 60.0]  # something has been done before the first round
    monkeypatch.setattr(harness.time, "monotonic", lambda: clock[0])

    def rounds(runs: int | None, seconds: float) -> int:
        clock[0], count = harness._BEGAN + 60.0, 0
        for _ in harness.rounds(runs):
            clock[0] += seconds
            count += 1
        return count

    assert [rounds(None, seconds) for seconds in (1, 60, 100, 1000)] == [harness.MOST_ROUNDS, 3, 2, 1]
    assert rounds(7, 1000) == 7


def test_restore_compares_a_peer_with_gloo_and_disk(tmp_path: Path) -> None:
    rows = quick_rows("restore", tmp_path)
    assert [row["path"] for row in rows] == ["peer", "gloo", "disk"]
    for row in rows[:3]:
        assert {"benchmark", "path", "bytes", "world_size", "median_s", "runs"} <= set(row)
        assert (row["benchmark"], row["bytes"], row["world_size"]) == ("restore", 10_000_000, 2)
        assert row["median_s"] > 0


def test_recovery_compares_both_launchers(tmp_path: Path) -> None:
    rows = quick_rows("recovery", tmp_path, "--faults=raise", "--launchers=hyperpodrun")
    rows += quick_rows("recovery", tmp_path, "--faults=kill")
    assert [(row["launcher"], row["fault"]) for row in rows] == [
        ("hyperpodrun", "raise"),
        ("hyperpodrun", "kill"),
        ("torchrun", "kill"),
    ]
    for row in rows:
        assert list(row) == ["benchmark", "launcher", "fault", "world_size", "median_s", "runs"]
        assert (row["benchmark"], row["world_size"]) == ("recovery", 2)
        assert row["runs"] == [row["median_s"]]
        assert row["median_s"] > 0


def test_dataloader_compares_the_loaders(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    command = [sys.executable, str(BENCHMARKS / "dataloader.py"), "--quick", "--workloads=tiny"]
    command += ["--loaders=torch,mmap", f"--json={path}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "every run was verified" in ended.stdout
    rows = json.loads(path.read_text())
    assert [(row["loader"], row["resume_step"]) for row in rows] == [
        ("DataLoader", 50),
        ("MMAPDataLoader", 50),
    ]
    for row in rows:
        assert (row["benchmark"], row["workload"]) == ("dataloader", "tiny")
        assert row["first_batch_s"] > 0
        assert row["batches_per_s"] > 0
        assert row["cpu_s"] > 0


@pytest.mark.more
def test_dataloader_compares_what_a_cold_node_can_do(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    command = [sys.executable, str(BENCHMARKS / "dataloader.py"), "--cold", "--quick", "--workloads=tiny"]
    ended = subprocess.run([*command, f"--json={path}"], capture_output=True, text=True, timeout=110)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = json.loads(path.read_text())
    assert [(row["benchmark"], row["from"]) for row in rows] == [
        ("dataloader-cold", "producer"),
        ("dataloader-cold", "peer"),
    ]
    assert all(row["first_batch_s"] > 0 for row in rows)


@pytest.mark.more
def test_launch_compares_both_launchers(tmp_path: Path) -> None:
    rows = quick_rows("launch", tmp_path)
    assert [(row["launcher"], row["script"]) for row in rows] == [
        ("hyperpodrun", "print"),
        ("torchrun", "print"),
        ("hyperpodrun", "ddp"),
        ("torchrun", "ddp"),
    ]
    for row in rows:
        assert list(row) == ["benchmark", "launcher", "script", "world_size", "median_s", "rss_mb"]
        assert (row["benchmark"], row["world_size"]) == ("launch", 2)
        assert row["median_s"] > 0
        assert row["rss_mb"] > 1


def test_control_counts_what_a_recovery_costs(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    command = [sys.executable, str(BENCHMARKS / "control.py"), "--quick", f"--json={path}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = json.loads(path.read_text())
    assert [row["agents"] for row in rows] == [10, 100]
    for row in rows:
        assert row["benchmark"] == "control"
        assert {"agents", "messages", "bytes", "cpu_s", "virtual_s"} <= set(row)
        assert 0 < row["messages"] <= 12 * row["agents"], "in proportion to the agents"
        assert 0 < row["bytes"] < 4000 * row["agents"]


def test_rendezvous_compares_both_launchers_or_says_why_not(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    command = [
        sys.executable,
        str(BENCHMARKS / "rendezvous.py"),
        "--quick",
        "--launchers=hyperpodrun",
        f"--json={path}",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = json.loads(path.read_text())
    if "skipped: " in ended.stdout:
        assert rows == []
        return
    (row,) = rows
    assert (row["benchmark"], row["launcher"], row["agents"], row["failed"]) == ("rendezvous", "hyperpodrun", 2, 0)
    assert 0 < row["first_line_s"] < row["start_s"]
    for what in ("start", "recovery"):
        reached = list(row[f"{what}_milestones_s"].values())
        assert reached == sorted(reached)
        assert 0 < reached[0] < reached[-1] == row[f"{what}_s"]
