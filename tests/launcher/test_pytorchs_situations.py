"""The situations of PyTorch's own test/distributed/launcher/test_run.py; docs/torchrun.md says which differ."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hyperpodrun.launcher import main
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

CHECKS_AND_TOUCHES = """
import os, pathlib, sys
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME",
             "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS",
             "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS"):
    assert os.environ[name] != "", name
assert os.environ["TEST_SENTINEL_PARENT"] == "FOOBAR"
if "--fail" in sys.argv:
    raise RuntimeError("raising exception since --fail flag was set")
pathlib.Path(sys.argv[1], os.environ["RANK"]).touch()
"""
TOUCHES = '#!/bin/sh\necho "creating $1/$RANK"\ntouch "$1/$RANK"\n'
EVERYBODY = {"0", "1", "2", "3"}


@pytest.fixture
def touched(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TEST_SENTINEL_PARENT", "FOOBAR")
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "touched"
    directory.mkdir()
    return directory


@pytest.fixture
def shell_script(tmp_path) -> str:
    path = tmp_path / "touches.sh"
    path.write_text(TOUCHES)
    path.chmod(0o755)
    return str(path)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize(
    "options",
    [
        ["--start-method=spawn", "--nnodes=1", "--rdzv-id=87654"],
        ["--start-method=spawn", "--nnodes=1", "--master-addr=localhost", "--master-port={port}", "--node-rank=0"],
        ["--start-method=spawn", "--nnodes=1", "--standalone"],
        ["--start-method=fork", "--nnodes=1", "--run-path"],  # of the four its record() would import torch four times
        ["--start-method=spawn", "--nnodes=1:2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:{port}",
         "--rdzv-conf=join_timeout=5,last_call_timeout=0.5", "--rdzv-id=elastic"],
    ],
    ids=["python", "caffe2", "standalone", "run_path", "elastic"],
)  # fmt: skip
def test_every_worker_runs(touched, script, free_port, options):
    filled = [option.format(port=free_port()) for option in options]
    main([*filled, "--nproc-per-node=4", "--monitor-interval=1", str(script(CHECKS_AND_TOUCHES)), str(touched)])
    assert names(touched) == EVERYBODY


@pytest.mark.parametrize("nproc", ["4", "auto", None])
def test_every_worker_of_a_shell_script_runs(touched, shell_script, nproc):
    options = ["--nnodes=1", "--rdzv-id=5", "--monitor-interval=1", "--start-method=spawn", "--no-python"]
    options += [] if nproc is None else [f"--nproc-per-node={nproc}"]
    with pytest.raises(ValueError, match="--module"):
        main([*options, "--module", shell_script, str(touched)])
    main([*options, shell_script, str(touched)])
    workers = {"4": 4, "auto": len(os.sched_getaffinity(0)), None: 1}[nproc]
    assert names(touched) == {str(rank) for rank in range(workers)}


def test_every_option_may_come_from_the_environment(touched, shell_script, monkeypatch):
    given = {"NNODES": "1", "NPROC_PER_NODE": "4", "RDZV_ID": "9", "MONITOR_INTERVAL": "1", "START_METHOD": "spawn"}
    for name, value in {**given, "NO_PYTHON": "1", "MODULE": "1"}.items():
        monkeypatch.setenv(f"PET_{name}", value)
    with pytest.raises(ValueError, match="--module"):
        main([shell_script, str(touched)])
    monkeypatch.setenv("PET_MODULE", "0")
    main([shell_script, str(touched)])
    assert names(touched) == EVERYBODY


@pytest.mark.parametrize(
    "options",
    [["--nproc-per-node=unknown"], ["--logs_specs=DOESNOT_EXIST", "--run-path"], ["--nnodes=2:20:30"]],
    ids=" ".join,
)
def test_what_cannot_be_meant_is_a_value_error(touched, shell_script, options):
    with pytest.raises(ValueError, match=r"unknown|DOESNOT_EXIST|2:20:30"):
        main([*options, shell_script, str(touched)])
    assert names(touched) == set()


def test_a_worker_that_raises_is_torchs_child_failed_error(touched, script, free_port):
    endpoint = f"--rdzv-endpoint=localhost:{free_port()}"
    options = ["--nnodes=1:2", "--nproc-per-node=4", "--rdzv-backend=c10d", endpoint, "--max-restarts=0"]
    options += ["--rdzv-conf=join_timeout=5,last_call_timeout=0.5", "--rdzv-id=fails", "--start-method=spawn"]
    with pytest.raises(ChildFailedError):
        main([*options, str(script(CHECKS_AND_TOUCHES)), "--fail"])


def test_two_agents_of_one_job(touched, script, free_port):
    options = ["--nnodes=1:2", "--nproc-per-node=4", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}"]
    options += ["--rdzv-id=several", "--monitor-interval=1", "--start-method=spawn"]
    command = [*options, str(script(CHECKS_AND_TOUCHES)), str(touched)]
    with subprocess.Popen([sys.executable, "-m", "hyperpodrun", *command]) as other:
        main(command)
        assert other.wait(60) == 0
    assert names(touched) == {str(rank) for rank in range(8)}


def test_init_method_tcp_at_the_port_of_the_agents_store(touched, script, free_port):
    body = """
import os, sys
import torch
import torch.distributed as dist
dist.init_process_group("gloo", init_method=sys.argv[1], rank=int(os.environ["RANK"]), world_size=4)
total = torch.tensor(dist.get_rank())
dist.all_reduce(total)
assert total == 6, total
assert dist.is_torchelastic_launched()
dist.barrier()
"""
    port = free_port()
    options = ["--run-path", "--nnodes=1", "--nproc-per-node=4", "--master-addr=localhost", f"--master-port={port}"]
    main([*options, str(script(body)), f"tcp://localhost:{port}"])


def test_teed_output_is_captured_with_a_prefix_of_ones_own(touched, shell_script, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "[rank${rank}]: ")
    options = ["--nnodes=1", "--nproc-per-node=4", "--redirect=3", "--tee=3", "--start-method=spawn", "--no-python"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        main([*options, shell_script, str(touched)])
    assert sorted(out.getvalue().splitlines()) == [f"[rank{rank}]: creating {touched}/{rank}" for rank in range(4)]
