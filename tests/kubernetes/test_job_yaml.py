"""examples/kubernetes/job.yaml: valid for the schemas, and with the meaning that its command relies on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from hyperpodrun.launcher import command
from hyperpodrun.launcher.discovery import expand_nodelist, scheduler

PATH = Path(__file__).parents[2] / "examples" / "kubernetes" / "job.yaml"
SERVICE, JOB = yaml.safe_load_all(PATH.read_text())
POD = JOB["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]


@pytest.mark.parametrize("version", ["1.29", "1.37"])
@pytest.mark.parametrize("manifest", [SERVICE, JOB], ids=["service", "job"])
def test_it_is_valid(manifest: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


def test_a_pod_is_replaced_and_the_others_live_on() -> None:
    assert POD["restartPolicy"] in ("OnFailure", "Never")
    assert "podFailurePolicy" not in JOB["spec"], "it would need restartPolicy Never, and to wait for dead nodes"
    assert JOB["spec"]["podReplacementPolicy"] == "TerminatingOrFailed"
    assert JOB["spec"]["backoffLimit"] >= 100, "past it, all pods are killed"
    assert JOB["spec"]["completions"] == JOB["spec"]["parallelism"]


def test_the_names_of_the_pods_are_the_endpoints() -> None:
    name, service = JOB["metadata"]["name"], SERVICE["metadata"]["name"]
    assert POD["subdomain"] == service
    assert SERVICE["spec"]["clusterIP"] == "None"
    assert SERVICE["spec"]["publishNotReadyAddresses"] is True
    assert SERVICE["spec"]["selector"].items() <= JOB["spec"]["template"]["metadata"]["labels"].items()
    (endpoint,) = [word for word in CONTAINER["command"] if word.startswith("--rdzv-endpoint=")]
    hosts = endpoint.partition("=")[2].split(",")
    assert hosts == [f"{name}-{index}.{service}" for index in range(3)]


def test_the_secret_is_mounted_where_the_command_reads_it() -> None:
    (secret,) = [volume for volume in POD["volumes"] if "secret" in volume]
    (mount,) = [mount for mount in CONTAINER["volumeMounts"] if mount["name"] == secret["name"]]
    assert f"--job-secret-file={mount['mountPath']}/secret" in CONTAINER["command"]
    assert not any("secret" in str(variable.get("value", "")) for variable in CONTAINER["env"])


def test_the_command_is_one_that_hyperpodrun_takes(monkeypatch, tmp_path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef0123")
    (tmp_path / "train.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    monkeypatch.setattr("hyperpodrun.launcher.discovery.resolve", lambda host: ["10.0.0.1"])
    monkeypatch.setattr("hyperpodrun.launcher.discovery.own_address_towards", lambda address: "10.0.0.4")
    arguments = [word.replace("/var/run/secrets/hyperpodrun/secret", str(secret)) for word in CONTAINER["command"][1:]]
    config = command.parse(arguments)
    assert config is not None
    assert config.cluster is not None
    assert config.nodes == (4, 4)
    assert config.nodes[1] < JOB["spec"]["completions"], "one pod is the spare"
    assert config.cluster.seeds == ("gpt-0.gpt:17000", "gpt-1.gpt:17000", "gpt-2.gpt:17000")
    assert config.cluster.order == 3
    assert config.cluster.address == "10.0.0.4"
    assert SERVICE["spec"]["ports"][0]["port"] == config.cluster.first_port
    assert "0123456789abcdef" not in repr(config)


def test_an_indexed_job_is_found_without_an_endpoint(monkeypatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "gpt-7")
    monkeypatch.setattr("socket.getfqdn", lambda: "gpt-7.gpt-svc.team.svc.cluster.local")
    found = scheduler({"JOB_COMPLETION_INDEX": "7"})
    assert found is not None
    assert found.hosts == ("gpt-0.gpt-svc", "gpt-1.gpt-svc", "gpt-2.gpt-svc")
    assert (found.order, found.run_id) == (7, "gpt")


def test_slurm_is_found_without_an_endpoint() -> None:
    found = scheduler({"SLURM_STEP_NODELIST": "gpu[01-03,17],big", "SLURM_NODEID": "2", "SLURM_JOB_ID": "4711"})
    assert found is not None
    assert found.hosts == ("gpu01", "gpu02", "gpu03")
    assert (found.order, found.run_id) == (2, "4711")
    assert scheduler({}) is None


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a", ["a"]),
        ("a,b-1", ["a", "b-1"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("r[1-2]n[01,03]", ["r1n01", "r1n03", "r2n01", "r2n03"]),
        ("x[1-2]-ib,y", ["x1-ib", "x2-ib", "y"]),
    ],
)
def test_slurms_host_lists(text: str, hosts: list[str]) -> None:
    assert expand_nodelist(text) == hosts
