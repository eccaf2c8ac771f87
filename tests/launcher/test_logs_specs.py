"""`--logs-specs`: a class from an entry point decides where output goes, under both launchers alike."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = """
import os
from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs

class ByHost(LogsSpecs):
    @property
    def root_log_dir(self):
        return str(self._root_log_dir)

    def reify(self, envs):
        attempt = envs[0]["TORCHELASTIC_RESTART_COUNT"]
        root = os.path.join(self._root_log_dir, f"try{attempt}")
        os.makedirs(root, exist_ok=True)
        print("printing does no harm")
        out = {rank: os.path.join(root, f"worker{rank}.out") for rank in envs}
        err = {rank: "" for rank in envs}
        error = {rank: os.path.join(root, f"worker{rank}.json") for rank in envs}
        for rank, env in envs.items():
            env["TORCHELASTIC_ERROR_FILE"] = error[rank]
        return LogsDest(out, err, {0: out[0]}, {}, error, os.path.join(root, "o"), os.path.join(root, "e"))

class Broken(ByHost):
    def reify(self, envs):
        raise ValueError("no room for logs")
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package with the entry points."""
    site = tmp_path / "site"
    information = site / "bylog-1.0.dist-info"
    information.mkdir(parents=True)
    (site / "bylog.py").write_text(MODULE)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: bylog\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        "[torchrun.logs_specs]\nbyhost = bylog:ByHost\nbroken = bylog:Broken\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


def launch(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", module, "--nproc-per-node=2", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=90)


@pytest.mark.parametrize("module", ["torch.distributed.run", "hyperpodrun"])
def test_the_class_says_where_output_goes(package, script, tmp_path, module):
    body = """
import os, sys
# In one piece: torchrun's tee shows what there is, also half a line.
sys.stdout.write(f"hello from {os.environ['RANK']} {os.environ['TORCHELASTIC_ERROR_FILE']}\\n")
"""
    worker = script(body)
    logs = tmp_path / module
    finished = launch(module, "--standalone", "--logs-specs=byhost", f"--log-dir={logs}", worker)
    assert finished.returncode == 0, finished.stderr
    for rank in (0, 1):
        written = (logs / "try0" / f"worker{rank}.out").read_text()
        assert written == f"hello from {rank} {logs}/try0/worker{rank}.json\n"
    assert "hello from 0" in finished.stdout
    assert "hello from 1" not in finished.stdout


def test_every_attempt_is_asked_for(package, run, script, tmp_path):
    worker = script("import os, sys\nprint('attempt')\nsys.exit(os.environ['TORCHELASTIC_RESTART_COUNT'] == '0')\n")
    finished = run(
        "--nproc-per-node=2", "--max-restarts=1", "--logs-specs=byhost", f"--log-dir={tmp_path / 'logs'}", worker
    )
    assert finished.returncode == 0, finished.output
    assert sorted(path.name for path in (tmp_path / "logs").glob("try*")) == ["try0", "try1"]


def test_an_unknown_name_is_a_usage_error(script):
    finished = launch("hyperpodrun", "--logs-specs=nobody", script("pass"))
    assert finished.returncode == 2
    assert "no installed package has an entry point torchrun.logs_specs:nobody" in finished.stderr


def test_a_class_that_fails_is_told_in_a_sentence(package, script, tmp_path):
    finished = launch("hyperpodrun", "--logs-specs=broken", f"--log-dir={tmp_path / 'logs'}", script("pass"))
    assert finished.returncode == 1
    assert "--logs-specs broken: ValueError: no room for logs" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert Path(tmp_path / "logs").is_dir()
