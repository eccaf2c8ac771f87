"""The variables of HyperPod's scripts: what each does here, and what a wrong value is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hyperpodrun.agent.config import LaunchConfig
from hyperpodrun.control.membership.identity import difference
from hyperpodrun.launcher import UsageError, command

BAD = {
    "HPCT_USE_ROOTLESS": ("2", "-1", "yes", "on"),
    "HPCT_PORT_BASE": ("0", "1023", "65001", "17000x", "-17000", "99999999"),
    "N_PROC_PER_NODE": ("0", "-1", "4097", "all", "2.0"),
}


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*BAD, "PET_NPROC_PER_NODE", "TORCHELASTIC_RUN_ID", "HYPERPODRUN_JOB", "NNODES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")


def parsed(*options: str) -> LaunchConfig:
    config = command.parse([*options, "train.py"])
    assert config is not None
    return config


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_wrong_value_is_one_sentence_that_names_the_variable(monkeypatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"{name}='?{value}") as refusal:
        parsed()
    assert "\n" not in str(refusal.value)
    assert refusal.value.exit_code == 2


@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_value_is_none(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    for name in BAD:
        monkeypatch.setenv(name, value)
    assert (parsed().rootless, parsed().nproc_per_node) == (True, 1)


def test_workers_are_counted_by_the_option_then_pet_then_n_proc_per_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("N_PROC_PER_NODE", "3")
    assert parsed().nproc_per_node == 3
    monkeypatch.setenv("PET_NPROC_PER_NODE", "4")
    assert parsed().nproc_per_node == 4
    assert parsed("--nproc-per-node=5").nproc_per_node == 5


def test_a_launch_inside_a_job_does_not_take_its_count_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("N_PROC_PER_NODE", "3")
    monkeypatch.setenv("HYPERPODRUN_JOB", "0123")
    assert parsed().nproc_per_node == 1


def test_nodes_with_a_shared_and_with_a_plain_store_are_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--nnodes=2", "--rdzv-endpoint=127.0.0.1", "--insecure")
    shared = parsed(*options)
    monkeypatch.setenv("HPCT_USE_ROOTLESS", "0")
    plain = parsed(*options)
    assert (shared.rootless, plain.rootless) == (True, False)
    assert shared.cluster is not None
    assert plain.cluster is not None
    said = difference(shared.cluster.identity, plain.cluster.identity, same_role=True)
    assert said == "it has HPCT_USE_ROOTLESS=0, and the job here none"


STOCK = """
import json, os, pathlib, sys
import torch, torch.distributed as dist
rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
dist.init_process_group("gloo")
total = torch.ones(1) + int(rank)
dist.all_reduce(total)
store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
store.set(f"own-{rank}", rank)
others = [store.get(f"own-{other}").decode() for other in range(2)]
told = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "HYPERPODRUN_STORE")}
pathlib.Path(f"told.{attempt}.{rank}").write_text(json.dumps([total.item(), others, told]))
dist.barrier()
if attempt == "0" and rank == "1":
    sys.exit(3)
dist.destroy_process_group()
"""


def test_without_rootless_all_ranks_dial_one_store_also_after_a_restart(
    tmp_path, free_port, script, monkeypatch, both_succeed
):
    """A script's own keys, which name no epoch, are those of one store, and of the epoch that it was started for."""
    monkeypatch.setenv("HPCT_USE_ROOTLESS", "0")
    port = free_port()
    worker = script(STOCK)
    options = ["--nnodes=2", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=plain", "--max-restarts=1"]
    errors = both_succeed(options, worker)
    told = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("told.*")}
    assert sorted(told) == [f"told.{attempt}.{rank}" for attempt in (0, 1) for rank in (0, 1)], errors
    assert all(total == 3.0 and others == ["0", "1"] for total, others, _ in told.values())
    dialled = {(names["MASTER_ADDR"], names["MASTER_PORT"]) for *_, names in told.values()}
    assert dialled == {("127.0.0.1", str(port + 100))}
    assert len({names["HYPERPODRUN_STORE"] for *_, names in told.values()}) == 2
