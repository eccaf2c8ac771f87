"""A process that has been restarted a hundred times holds no more than one that was restarted a few times."""

from __future__ import annotations

import re
from pathlib import Path

WORKER = Path(__file__).parent / "workers" / "soak.py"
FAULTS = 100


def test_a_hundred_restarts_leave_descriptors_threads_and_memory_as_they_were(run, capsys):
    finished = run("--nproc-per-node=2", "--inprocess-restart", WORKER, str(FAULTS))
    assert finished.returncode == 0, finished.output
    assert len(finished.recoveries) == FAULTS
    rows = [
        {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", line)} for line in finished.stdout.splitlines()
    ]
    # A fault can overtake the news of a peer's step: that recovery was over, but not seen to be, and has no total.
    totals = [row["total_ms"] for row in finished.recoveries if row["completed"]]
    with capsys.disabled():
        print(f"\n{FAULTS} recoveries, {min(totals):.1f} to {max(totals):.1f} ms")
        for row in rows:
            if row["rank"] == 0:
                print("  " + " ".join(f"{name}={value}" for name, value in row.items()))
    for rank in (0, 1):
        of_rank = [row for row in rows if row["rank"] == rank]
        assert len({row["pid"] for row in of_rank}) == 1
        early = [row for row in of_rank if 20 <= row["epoch"] <= 40]
        late = [row for row in of_rank if row["epoch"] >= FAULTS - 20]
        for name, noise in (("fds", 2), ("threads", 2), ("rss_kb", 8 * 1024)):
            before = max(row[name] for row in early)
            after = min(row[name] for row in late)
            assert after <= before + noise, (name, of_rank)
