"""How an agent finds the others, by what the command line and the environment say."""

from __future__ import annotations

from pathlib import Path

import pytest
from hyperpodrun.agent.config import Cluster
from hyperpodrun.launcher import UsageError, command

SECRET = "0123456789abcdef0123"
HERE = "10.0.0.4"
HOSTS = {
    "host0": ["10.0.0.1"],
    "host1": [HERE],
    HERE: [HERE],
    "six0": ["fd00::1"],
    "fd00::1": ["fd00::1"],
    "localhost": ["127.0.0.1"],
}
SCHEDULED = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODEID", "SLURM_JOB_ID", "JOB_COMPLETION_INDEX")


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This machine is host1 of a network that is not there."""
    for name in SCHEDULED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HYPERPODRUN_JOB_SECRET", SECRET)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    module = "hyperpodrun.launcher.discovery"
    monkeypatch.setattr(f"{module}.resolve", lambda host: HOSTS.get(host, []))
    monkeypatch.setattr(f"{module}.is_local", lambda address: address in (HERE, "fd00::4", "127.0.0.1"))
    monkeypatch.setattr(f"{module}.own_address_towards", lambda a: "fd00::4" if ":" in a else HERE)
    monkeypatch.setattr(f"{module}.interface_of", lambda address: "eth0")
    monkeypatch.setattr(f"{module}.socket.gethostname", lambda: "host1")


def cluster(*options: str) -> Cluster:
    config = command.parse([*options, "train.py"])
    assert config is not None
    assert config.cluster is not None
    return config.cluster


def test_one_endpoint_elsewhere() -> None:
    found = cluster("--nnodes=2", "--rdzv-endpoint=host0")
    assert found.seeds == ("host0:17000",)
    assert (found.own_seed, found.first_port) == (None, 17000)
    assert (found.address, found.bind, found.interface) == (HERE, "*", "eth0")


def test_of_a_list_of_hosts_this_is_one_with_a_port_of_its_own() -> None:
    found = cluster("--nnodes=2:3", "--rdzv-endpoint=host0,host1:18000,10.0.0.9")
    assert found.seeds == ("host0:17000", "host1:18000", "10.0.0.9:17000")
    assert (found.own_seed, found.first_port) == (1, 18000)
    assert found.as_seed


def test_the_port_base_is_the_default_of_every_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCT_PORT_BASE", "20000")
    found = cluster("--nnodes=2", "--rdzv-endpoint=host0")
    assert (found.seeds, found.first_port) == (("host0:20000",), 20000)


@pytest.mark.parametrize("endpoint", ["[fd00::1]:18000", "six0:18000"])
def test_ipv6(endpoint: str) -> None:
    found = cluster("--nnodes=2", f"--rdzv-endpoint={endpoint}")
    assert found.seeds == (endpoint,)
    assert (found.address, found.bind) == ("fd00::4", "*")


def test_static_node_ranks_are_the_order() -> None:
    found = cluster("--nnodes=3", "--node-rank=2", "--rdzv-backend=static", "--master-addr=host0", "--master-port=5555")
    assert (found.seeds, found.order) == (("host0:5555",), 2)


def test_slurm_says_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NODELIST", "host[0-4]")
    monkeypatch.setenv("SLURM_NODEID", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    found = cluster("--nnodes=5")
    assert found.seeds == ("host0:17000", "host1:17000", "host2:17000")
    assert (found.own_seed, found.order) == (1, 1)


def test_a_local_address_is_the_one_that_is_offered() -> None:
    found = cluster("--nnodes=2", "--rdzv-endpoint=host1", f"--local-addr={HERE}")
    assert (found.address, found.as_seed) == (HERE, False)


def test_timeouts() -> None:
    conf = "join_timeout=9,last_call_timeout=8,close_timeout=7,heartbeat_interval=0.5,heartbeat_limit=2"
    found = cluster("--nnodes=2", "--rdzv-endpoint=host0", f"--rdzv-conf={conf}")
    assert (found.join_timeout, found.last_call_timeout, found.close_timeout) == (9, 8, 7)
    assert (found.heartbeat_interval, found.heartbeat_limit) == (0.5, 2)
    default = cluster("--nnodes=2", "--rdzv-endpoint=host0")
    assert (default.join_timeout, default.last_call_timeout, default.close_timeout) == (600, 30, 5)
    assert (default.heartbeat_interval, default.heartbeat_limit) == (1, 5)


def test_a_secret_is_needed_and_on_one_machine_the_user_has_one(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr("hyperpodrun.launcher.machine_secret.PLACES", (str(tmp_path),))
    assert cluster("--nnodes=2", "--rdzv-endpoint=host0").secret == SECRET.encode()
    monkeypatch.delenv("HYPERPODRUN_JOB_SECRET")
    with pytest.raises(UsageError, match="--insecure"):
        cluster("--nnodes=2", "--rdzv-endpoint=host0")
    assert cluster("--nnodes=2", "--rdzv-endpoint=host0", "--insecure").secret is None
    on_one_machine = cluster("--nnodes=2", "--rdzv-endpoint=localhost")
    (file,) = tmp_path.glob("*/*")
    assert (on_one_machine.secret, on_one_machine.bind) == (file.read_bytes(), "127.0.0.1")
    assert cluster("--nnodes=2", "--rdzv-endpoint=localhost", "--insecure").secret is None
    monkeypatch.setattr("hyperpodrun.launcher.machine_secret.PLACES", ("/nonexistent",))
    with pytest.raises(UsageError, match=r"/nonexistent/hyperpodrun-\d+: No such file or directory.*--insecure"):
        cluster("--nnodes=2", "--rdzv-endpoint=localhost")


BAD = [
    ["--rdzv-endpoint=host0:70000"],
    ["--rdzv-endpoint=host0", "--rdzv-conf=join_timeout=soon"],
    ["--rdzv-endpoint=host0", "--rdzv-conf=close_timeout=-1"],
    ["--rdzv-endpoint=host0", "--rdzv-conf=heartbeat_limit=inf"],
    ["--rdzv-endpoint=host0", "--rdzv-conf=heartbeat_interval=3,heartbeat_limit=5"],
    ["--rdzv-backend=c10d", "--rdzv-endpoint=host0", "--rdzv-conf=rank=first"],
    ["--rdzv-endpoint=host0", "--local-addr=nobody"],
    ["--rdzv-endpoint=host0", "--job-secret-file=/nonexistent"],
    ["--rdzv-backend=static", "--master-addr=host0", "--node-rank=2"],
    ["--rdzv-backend=etcd", "--rdzv-endpoint=host0"],
]


@pytest.mark.parametrize("options", BAD, ids=" ".join)
def test_bad_input_is_one_sentence(options: list[str]) -> None:
    with pytest.raises(UsageError) as refusal:
        cluster("--nnodes=2", *options)
    assert "\n" not in str(refusal.value)


def test_a_bad_port_base_or_a_short_secret_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERPODRUN_JOB_SECRET", "short")
    with pytest.raises(UsageError, match="shorter than 16 bytes"):
        cluster("--nnodes=2", "--rdzv-endpoint=host0")
    monkeypatch.setenv("HPCT_PORT_BASE", "0")
    with pytest.raises(UsageError, match="HPCT_PORT_BASE"):
        cluster("--nnodes=2", "--rdzv-endpoint=host0")
