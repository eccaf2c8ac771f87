"""What of Hugging Face's integration needs none of its packages: saying that they are missing, and reading a file."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hyperpodrun.checkpointless.errors import UnsupportedStateError
from hyperpodrun.integrations.accelerate.config import apply_config, variables
from hyperpodrun.integrations.accelerate.missing import require
from hyperpodrun.integrations.accelerate.place import Place

CONFIG = """\
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: MULTI_GPU
dynamo_config:
  dynamo_backend: INDUCTOR
  dynamo_mode: default
mixed_precision: bf16
num_machines: 1
num_processes: 8
use_cpu: false
"""


@pytest.mark.parametrize(
    ("module", "package"), [("hf", "transformers"), ("accelerate", "accelerate")], ids=["hf", "accelerate"]
)
def test_a_missing_package_is_one_sentence(module, package):
    code = f"""
import sys
sys.modules[{package!r}] = None  # as if it were not installed
from hyperpodrun.integrations.{module} import recoverable
try:
    recoverable(lambda: None)
except ImportError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert said.stdout.strip() == (
        f"hyperpodrun.integrations.{module}.recoverable needs the package {package}, which is not installed: "
        "pip install 'hyperpodrun[hf]'"
    ), said.stderr


def test_an_error_inside_of_a_package_is_not_taken_for_its_absence(tmp_path, monkeypatch):
    (tmp_path / "half_there.py").write_text("import surely_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="surely_not_there"):
        require("half_there", user="x", extra="hf")


def test_a_file_of_accelerate_config_means_what_it_means_for_accelerate_launch(tmp_path, caplog):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    environ = {"ACCELERATE_CONFIG_FILE": str(path), "WORLD_SIZE": "4", "RANK": "0", "ACCELERATE_DYNAMO_MODE": "max"}
    apply_config(environ)
    assert environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert environ["ACCELERATE_DYNAMO_BACKEND"] == "INDUCTOR"
    assert environ["ACCELERATE_DYNAMO_MODE"] == "max", "what is set counts more"
    assert "ACCELERATE_USE_CPU" not in environ
    assert "says num_processes: 8, and this job has 4" in caplog.text


def test_the_file_that_accelerate_config_writes_is_found(tmp_path):
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text("mixed_precision: fp16\nuse_cpu: true\n")
    environ = {"HF_HOME": str(tmp_path)}
    apply_config(environ)
    assert environ["ACCELERATE_MIXED_PRECISION"] == "fp16"
    assert environ["ACCELERATE_USE_CPU"] == "true"
    apply_config(nothing := {"HF_HOME": str(tmp_path / "elsewhere")})
    assert nothing == {"HF_HOME": str(tmp_path / "elsewhere")}


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_what_is_not_recovered_is_refused_by_the_file(tmp_path, kind):
    path = tmp_path / "config.yaml"
    path.write_text(f"distributed_type: {kind}\n")
    with pytest.raises(UnsupportedStateError, match=f"distributed_type: {kind}"):
        apply_config({"ACCELERATE_CONFIG_FILE": str(path)})


@pytest.mark.parametrize(
    ("name", "text"), [("a.yaml", "- 1"), ("a.yaml", "a: ["), ("a.json", "{"), ("none.yaml", None)]
)
def test_a_file_that_is_none_is_named(tmp_path, name, text):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        apply_config({"ACCELERATE_CONFIG_FILE": str(tmp_path / name)})


def test_what_is_off_sets_nothing():
    assert variables({"use_cpu": False, "debug": False, "mixed_precision": None, "dynamo_config": {}}) == {}


def test_a_place_knows_what_was_before_and_after_the_pause_between_two_steps():
    place = Place()
    assert place.at(repeats=True) == ({}, {})
    place.settle({"step": 3}, {"loss": 1.0})
    assert place.at(repeats=True) == place.at(repeats=False) == ({"step": 3}, {"loss": 1.0})
    place.follow({"step": 3, "best": 2}, {"loss": 0.0}, {"generators": {}})
    assert place.at(repeats=False) == ({"step": 3, "best": 2}, {"loss": 0.0})
    assert place.at(repeats=True) == ({"step": 3}, {"loss": 1.0, "generators": {}})
    place.foresee({"loss": 5.0})
    assert place.at(repeats=True)[0] == {"step": 3}, "until the update, the step may begin again with all its pause"
    other = Place()
    other.load_host_state(place.host_state())
    other.load_rank_state(place.rank_state())
    assert other.at(repeats=False) == place.at(repeats=False)
