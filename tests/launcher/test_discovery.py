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
SCHEDULED = (
    "NNODES",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "PET_NNODES",
    "TORCHELASTIC_RUN_ID",
    "HYPERPODRUN_JOB",
    "SLURM_STEP_NODELIST",
    "SLURM_JOB_NODELIST",
    "SLURM_NODEID",
    "SLURM_JOB_ID",
    "JOB_COMPLETION_INDEX",
)


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


@pytest.mark.parametrize("loopback", ["127.0.1.1", "127.0.0.1", "::1"])
@pytest.mark.parametrize("options", [[], ["--local-addr=nodea"]], ids=" ".join)
def test_a_name_that_the_hosts_file_leads_to_loopback_is_of_a_node_among_many(
    monkeypatch: pytest.MonkeyPatch, loopback: str, options: list[str]
) -> None:
    monkeypatch.setitem(HOSTS, "nodea", [loopback])
    monkeypatch.setattr("hyperpodrun.launcher.discovery.is_local", lambda address: address in (HERE, loopback))
    monkeypatch.setattr("hyperpodrun.launcher.discovery.own_address_outside", lambda: HERE)
    found = cluster("--nnodes=2", "--rdzv-endpoint=nodea:29400", *options)
    assert (found.own_seed, found.bind, found.interface) == (0, "*", "eth0")
    assert found.address == ("nodea" if options else HERE)
    monkeypatch.delenv("HYPERPODRUN_JOB_SECRET")
    with pytest.raises(UsageError, match="needs a secret"):
        cluster("--nnodes=2", "--rdzv-endpoint=nodea:29400", *options)


@pytest.mark.parametrize("endpoint", ["localhost", "127.0.0.1:2000", "127.0.1.1", "[::1]:2000", "ip6-localhost"])
def test_what_is_written_as_loopback_is_one_machine(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    address = "::1" if ":1]" in endpoint or "6" in endpoint else "127.0.0.1"
    monkeypatch.setattr("hyperpodrun.launcher.discovery.resolve", lambda host: [address])
    monkeypatch.setattr("hyperpodrun.launcher.discovery.is_local", lambda address: True)
    monkeypatch.setattr("hyperpodrun.launcher.discovery.machine_secret", lambda: b"the secret of this machine's user")
    monkeypatch.delenv("HYPERPODRUN_JOB_SECRET")
    found = cluster("--nnodes=2", f"--rdzv-endpoint={endpoint}")
    assert (found.bind, found.address) == (address, address)
    assert found.secret == b"the secret of this machine's user"


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


@pytest.mark.parametrize("quote", ["'", '"'])
def test_quotes_that_no_shell_has_taken_away_are_none_of_a_setting(quote: str) -> None:
    found = cluster("--nnodes=1:2", "--rdzv-endpoint=host0", f"--rdzv-conf={quote}join_timeout=5,timeout=6{quote}")
    assert found.join_timeout == 5
    found = cluster("--nnodes=2", "--rdzv-endpoint=host0", f"--rdzv-conf=join_timeout={quote}7{quote}, a=8{quote}")
    assert found.join_timeout == 7


def test_timeout_means_what_it_means_for_torchrun() -> None:
    for backend in ("c10d", "hyperpod"):  # nothing
        found = cluster("--nnodes=2", f"--rdzv-backend={backend}", "--rdzv-endpoint=host0", "--rdzv-conf=timeout=5'")
        assert found.join_timeout == 600
    static = ["--nnodes=2", "--rdzv-backend=static", "--master-addr=host0", "--node-rank=1"]
    assert cluster(*static, "--rdzv-conf=timeout=5").join_timeout == 5
    assert cluster(*static, "--rdzv-conf=timeout=5,join_timeout=9").join_timeout == 9


OPERATORS = {"NNODES": "16", "NODE_RANK": "3", "MASTER_ADDR": "host0", "MASTER_PORT": "4444"}


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in OPERATORS.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize("options", [[], ["--rdzv-backend=c10d"], ["--inprocess-restart"]], ids=" ".join)
def test_an_operators_variables_make_one_job_of_all_nodes(options: list[str]) -> None:
    config = command.parse([*options, "train.py"])
    assert config is not None
    assert config.cluster is not None
    assert (config.nodes, config.cluster.seeds, config.cluster.order) == ((16, 16), ("host0:4444",), 3)
    assert config.rendezvous.because == "MASTER_ADDR in the environment"


@pytest.mark.usefixtures("operator")
def test_what_is_written_counts_more_than_an_operators_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    written = cluster("--rdzv-endpoint=host1", "--rdzv-backend=static", "--node-rank=5")
    assert (written.seeds, written.order) == (("host1:17000",), 5)
    assert cluster("--node-rank=4", "--master-port=9").seeds == ("host0:9",)
    monkeypatch.setenv("PET_NNODES", "2:4")
    config = command.parse(["--node-rank=1", "train.py"])
    assert config is not None
    assert (config.nodes, config.node_rank) == ((2, 4), 1)
    for alone in ("--nnodes=1", "--standalone"):
        config = command.parse([alone, "train.py"])
        assert config is not None
        assert config.cluster is None
    monkeypatch.delenv("PET_NNODES")
    monkeypatch.setenv("HYPERPODRUN_JOB", "a launch within a worker")
    config = command.parse(["train.py"])
    assert config is not None
    assert config.cluster is None


def test_a_scheduler_knows_the_hosts_of_nnodes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("NNODES", "5"), ("SLURM_JOB_NODELIST", "host[0-4]"), ("SLURM_NODEID", "1")):
        monkeypatch.setenv(name, value)
    assert cluster().seeds == ("host0:17000", "host1:17000", "host2:17000")


@pytest.mark.parametrize(
    ("environment", "options", "said"),
    [
        ({"NNODES": "16"}, [], "NNODES=16 in the environment, and nothing says where the other nodes are"),
        ({"NNODES": "16", "NODE_RANK": "1"}, ["--master-port=1"], "nothing says where"),
        ({"NNODES": "16"}, ["--inprocess-restart"], "HyperPod's operator, which this version cannot talk to"),
        ({"NNODES": "2"}, ["--server-port=8080"], "HyperPod's operator"),
        ({"NNODES": "many"}, [], "NNODES='many' in the environment is neither N nor MIN:MAX"),
        ({**OPERATORS, "NODE_RANK": "16"}, [], "NODE_RANK='16' in the environment: there are nodes 0 to 15"),
        ({**OPERATORS, "MASTER_PORT": "tcp"}, [], "'host0:tcp' is not an endpoint"),
    ],
)
def test_nnodes_without_a_place_to_meet_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], options: list[str], said: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=said):
        command.parse([*options, "train.py"])


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
