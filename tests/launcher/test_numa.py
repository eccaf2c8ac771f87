"""--numa-binding: which cores a worker gets, on a machine made of files."""

from __future__ import annotations

import stat
from pathlib import Path

import click
import pytest
from hyperpodrun.launcher import UsageError, command, main, numa

GPUS = ["0000:01:00.0", "0000:02:00.0", "0000:81:00.0"]
GPU_NODES = [0, 0, 1]


@pytest.fixture
def sys(tmp_path) -> Path:
    """Two sockets, a NUMA node each: 4 cores with 2 threads, 2 cores to a cache. GPUs 0 and 1 are at node 0."""

    def write(file: str, text: object) -> None:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")

    for address, node in zip(GPUS, GPU_NODES, strict=True):
        write(f"bus/pci/devices/{address}/numa_node", node)
    write("devices/system/node/possible", "0-1")
    write("devices/system/node/node0/cpulist", "0-3,8-11")
    write("devices/system/node/node1/cpulist", "4-7,12-15")
    for cpu in range(16):
        core = cpu % 8
        write(f"devices/system/cpu/cpu{cpu}/topology/physical_package_id", core // 4)
        write(f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"{core},{core + 8}")
        first = core // 2 * 2
        caches = [("Data", 1, f"{core},{core + 8}"), ("Unified", 3, f"{first}-{first + 1},{first + 8}-{first + 9}")]
        for index, (kind, level, shared) in enumerate(caches):
            for name, text in (("type", kind), ("level", level), ("shared_cpu_list", shared)):
                write(f"devices/system/cpu/cpu{cpu}/cache/index{index}/{name}", text)
    return tmp_path


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("node", ["0-3,8-11", "0-3,8-11", "4-7,12-15"]),
        ("socket", ["0-3,8-11", "0-3,8-11", "4-7,12-15"]),
        ("exclusive", ["0-1,8-9", "2-3,10-11", "4-7,12-15"]),
        ("core-complex", ["0-1,8-9", "2-3,10-11", "4-5,12-13"]),
    ],
)
def test_each_worker_gets_the_cores_near_its_gpu(sys, mode, expected):
    machine = numa.Topology(GPUS, sys, set(range(16)))
    assert [numa.format_cores(machine.cores(mode, gpu)) for gpu in range(3)] == expected


def test_only_cores_that_this_process_may_use(sys):
    machine = numa.Topology(GPUS, sys, {1, 2, 3})
    assert machine.cores("node", 0) == {1, 2, 3}
    assert [machine.cores("exclusive", gpu) for gpu in (0, 1)] == [{1, 2}, {3}], "the first has one more"
    with pytest.raises(click.UsageError, match="no core near GPU 2"):
        machine.cores("node", 2)
    with pytest.raises(click.UsageError, match="no GPU for local rank 3"):
        machine.cores("node", 3)


def test_workers_are_started_through_numactl(script, tmp_path, monkeypatch, capfd):
    program = tmp_path / "numactl"
    program.write_text('#!/bin/sh\necho "$1"\nshift\nexec "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(numa, "bind", lambda mode, workers: tuple(f"{rank}-{rank + 1}" for rank in range(workers)))
    main(["--numa-binding=node", "--nproc-per-node=2", str(script(r"import os; os.write(1, b'it runs\n')"))])
    expected = ["--physcpubind=0-1", "--physcpubind=1-2", "it runs", "it runs"]
    assert sorted(capfd.readouterr().out.splitlines()) == expected


def test_where_it_cannot_be_had_it_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="numactl"):
        command.parse(["--numa-binding=node", "/bin/true"])
