"""A script that changes what libraries read at import is recognised by its text; reading is no change."""

from __future__ import annotations

import pytest
from hyperpodrun.agent.workers.imports import PythonCommand, examine
from hyperpodrun.agent.workers.settings import OF_THE_JOB, READ_LATER, change_in

CHANGES = {
    'os.environ["TORCH_COMPILE_DISABLE"] = "1"': "TORCH_COMPILE_DISABLE",
    'os.environ.setdefault("OMP_NUM_THREADS", "4")': "OMP_NUM_THREADS",
    'os.environ.update({"MASTER_ADDR": "x", "PYTORCH_JIT": "0"})': "PYTORCH_JIT",
    'os.environ.update(PYTORCH_JIT="0")': "PYTORCH_JIT",
    "os.environ.update(settings)": "the environment",
    'os.environ |= {"FX_PATCH_GETITEM": "1"}': "FX_PATCH_GETITEM",
    'del os.environ["MKL_NUM_THREADS"]': "MKL_NUM_THREADS",
    'os.environ.pop("MKL_NUM_THREADS", None)': "MKL_NUM_THREADS",
    'os.putenv("OMP_PROC_BIND", "true")': "OMP_PROC_BIND",
    "for k, v in config.items():\n    os.environ[k] = v": "the environment",
    'os.environb[b"CUDA_VISIBLE_DEVICES"] = b"1"': "CUDA_VISIBLE_DEVICES",
    "from os import environ as e": "the environment",
    'from os import environ\nenviron["TRITON_INTERPRET"] = "1"': "TRITON_INTERPRET",
    "environment = os.environ": "the environment",
    "configure(os.environ)": "the environment",
    'getattr(os, "environ")[name] = value': "the environment",
    "os.environ.clear()": "the environment",
    "from dotenv import load_dotenv": "the environment (dotenv)",
    'ctypes.CDLL(None).setenv(b"OMP_NUM_THREADS", b"3", 1)': "OMP_NUM_THREADS",
    "os.sched_setaffinity(0, {1})": "the processors it may use",
    'sys.modules["triton"] = None': "sys.modules",
    "sys.setdlopenflags(flags)": "how libraries are loaded",
    'patch.dict("sys.modules", {"numpy": None})': "sys.modules",
    "sys.meta_path.insert(0, Finder())": "how modules are imported",
    "logging.setLoggerClass(Ours)": "the class of loggers",
}
READS = [
    'rank = int(os.environ["RANK"])',
    'os.environ.get("OMP_NUM_THREADS", "1")',
    'if "TORCH_LOGS" in os.environ: pass',
    'subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"})',
    "subprocess.run(command, env=os.environ)",
    "environment = dict(os.environ)\nenvironment['OMP_NUM_THREADS'] = '2'",
    "copy = os.environ.copy()",
    "names = [finder for finder in sys.meta_path]",
    "if len(sys.meta_path) > 4: pass",
    "print({k: v for k, v in os.environ.items()}, os.getenv('PYTORCH_JIT'))",
    'os.environ["MASTER_ADDR"] = "localhost"',
    'os.environ.setdefault("NCCL_DEBUG", "INFO")',
    'os.environ["TOKENIZERS_PARALLELISM"] = "false"',
    'os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"',
    "psutil.Process().cpu_affinity(); os.sched_getaffinity(0)",
    "x = sys.modules['torch']",
    "# os.environ['TORCH_LOGS'] = 'all'",
    "os.environ[ = 1",
]


@pytest.mark.parametrize("text", CHANGES)
def test_a_change_is_named(text: str) -> None:
    found = change_in(f"import os\n{text}\nimport torch\n", READ_LATER)
    assert found == f"line {2 + text.count(chr(10))} changes {CHANGES[text]}"


@pytest.mark.parametrize("text", READS)
def test_reading_is_no_change(text: str) -> None:
    assert change_in(text, READ_LATER) is None


def test_modules_of_the_users_choice_may_read_any_name() -> None:
    assert change_in('os.environ["HF_HOME"] = "/x"', OF_THE_JOB) is not None
    assert change_in('os.environ["MASTER_PORT"] = "1"', OF_THE_JOB) is None


SETS = "import os\nos.environ['PYTORCH_JIT'] = '0'\n"


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("import settings", "settings.py"),
        ("from conf.early import *", "conf/early.py"),
        ("from conf import early", "conf/__init__.py"),
        ("exec(open('settings.py').read())", "settings.py"),
        ("import importlib; importlib.import_module('settings')", "settings.py"),
        ("import elsewhere", "path/elsewhere.py"),
        ("import installed", "site-packages/installed/__init__.py"),
    ],
)
def test_it_may_be_in_another_file(tmp_path, monkeypatch, line: str, file: str) -> None:
    monkeypatch.chdir(tmp_path)
    for directory in ("path", "site-packages"):
        monkeypatch.syspath_prepend(str(tmp_path / directory))
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "early.py").touch()
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(SETS)
    script = tmp_path / "train.py"
    script.write_text(f"{line}\nimport torch\nmodel = torch.compile(model)\n")
    _, change = examine(PythonCommand(str(script), module=False), READ_LATER)
    assert change == f"{(tmp_path / file).resolve()}, line 2 changes PYTORCH_JIT"
