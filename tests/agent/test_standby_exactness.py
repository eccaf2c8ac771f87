"""A worker forked from the standby source is what a new process would be: each point, cold and forked, equal."""

from __future__ import annotations

import ast
import json
import os
import re
import sys

import pytest


@pytest.fixture(autouse=True)
def standbys_are_on(monkeypatch):
    """Also where the whole suite runs without them."""
    monkeypatch.setenv("HYPERPODRUN_STANDBY", "1")


METHODS = ["spawn", "standby"]

OBSERVE = """
import torch
{definitions}
def observe():
    import os, sys, signal, io
{body}
if __name__ == "__main__":
    import json, os, sys
    seen = observe()
    name = f"seen.{{os.environ['RUN']}}.{{os.environ['RANK']}}"
    with open(f"{{name}}.tmp", "w") as file:
        file.write(repr(seen))
    os.rename(f"{{name}}.tmp", name)
"""

EQUAL = {
    "main_module": """
    main = sys.modules["__main__"]
    return (main.__name__, main.__file__, main.__spec__, main.__package__, main.__doc__, main.__cached__,
            type(main.__loader__).__name__, main.__builtins__ is __import__("builtins"), sorted(vars(main)), __name__)
    """,
    "arguments": "    return sys.argv, sys.orig_argv, sys.executable, sys.flags, sys._xoptions, sys.warnoptions",
    "path": "    return sys.path, 'sitecustomize' in sys.modules",
    "command_line_in_proc": """
    text = open("/proc/self/cmdline").read()
    return text, open("/proc/self/comm").read()
    """,
    "environment": """
    import ctypes, posix
    volatile = ("HYPERPODRUN_JOB", "HYPERPODRUN_AGENT", "HYPERPODRUN_DATA", "HYPERPODRUN_STATE", "HYPERPODRUN_STORE",
                "MASTER_PORT", "TORCHELASTIC_ERROR_FILE", "RUN")
    def steady(pairs):
        return sorted((k, v) for k, v in pairs if not k.startswith(volatile) and "PYTEST" not in k)
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_char_p
    shown = [e.partition("=")[::2] for e in open("/proc/self/environ").read().split(chr(0)) if e]
    c_environ = ctypes.POINTER(ctypes.c_char_p).in_dll(libc, "environ")
    count = 0
    while c_environ[count]:
        count += 1
    assert count == len(os.environ), (count, len(os.environ))
    for name, value in os.environ.items():
        assert libc.getenv(name.encode()) == value.encode(), name
    assert dict(shown) == dict(os.environ) == {os.fsdecode(k): os.fsdecode(v) for k, v in posix.environ.items()}
    return steady(os.environ.items())
    """,
    "descriptors": "    return sorted(os.listdir('/proc/self/fd'))",
    "streams": """
    def facts(stream):
        raw = getattr(stream.buffer, "raw", stream.buffer)
        return (stream.name, stream.mode, stream.encoding, stream.errors, stream.line_buffering, stream.write_through,
                type(stream.buffer).__name__, raw.mode, raw.closefd, raw.name, stream.isatty(), stream.seekable(),
                repr(raw), stream.fileno())
    return [facts(s) for s in (sys.stdin, sys.stdout, sys.stderr)], sys.stdout is sys.__stdout__, \\
        sys.stderr is sys.__stderr__
    """,
    "signals": """
    def number(field):
        return [line.split()[1] for line in open("/proc/self/status") if line.startswith(field)][0]
    handlers = [repr(signal.getsignal(s)).split(" at ")[0] for s in sorted(signal.valid_signals())]
    return handlers, [number(f) for f in ("SigBlk:", "SigIgn:", "SigPnd:", "ShdPnd:")], signal.pthread_sigmask(0, [])
    """,
    "session": """
    import ctypes
    death = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(death))
    parent = open(f"/proc/{os.getppid()}/cmdline").read()
    return os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid(), death.value, "hyperpodrun" in parent
    """,
    "surroundings": """
    import resource
    limits = [resource.getrlimit(n) for n in (resource.RLIMIT_NOFILE, resource.RLIMIT_CORE, resource.RLIMIT_STACK)]
    return os.getcwd(), os.umask(0o22), limits, os.nice(0), sorted(os.sched_getaffinity(0))
    """,
    "threads": """
    import threading
    main = threading.main_thread()
    return (threading.active_count(), main is threading.current_thread(), main.name,
            main.ident == threading.get_ident(), main.native_id == threading.get_native_id(),
            main.native_id == os.getpid())
    """,
    "torch_threads": """
    torch.ones(1000, 1000).sum()
    return torch.get_num_threads(), torch.get_num_interop_threads(), torch.cuda.is_initialized()
    """,
    "stack": """
    import inspect, traceback
    return [frame.function for frame in inspect.stack()], len(traceback.extract_stack())
    """,
    "collector": "    import gc; return gc.isenabled(), gc.get_threshold()",
    "faulthandler": "    import faulthandler; return faulthandler.is_enabled()",
    "torch_state": """
    return (torch.get_default_dtype(), torch.is_grad_enabled(), torch.distributed.is_initialized(),
            torch.cuda._is_in_bad_fork(), torch.cuda.is_available())
    """,
    "torch_as_a_module": """
    import numpy
    return [(m.__spec__.name, type(m.__spec__.loader).__name__, type(m.__loader__).__name__, m.__spec__.origin,
             m.__spec__.has_location, sys.modules[m.__name__] is m) for m in (torch, torch.nn, numpy)], \
        [getattr(finder, "__name__", type(finder).__name__) for finder in sys.meta_path]
    """,
    "multiprocessing_identity": """
    import multiprocessing
    me = multiprocessing.current_process()
    return me.name, multiprocessing.parent_process(), me._identity, len(me.authkey), multiprocessing.get_start_method()
    """,
    "pools": """
    import multiprocessing
    results = []
    for method in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            results.append(pool.apply(double, (Box(21),)).value)
    return results
    """,
    "data_loader": """
    data = torch.utils.data.TensorDataset(torch.arange(4))
    return [int(x[0]) for x in torch.utils.data.DataLoader(data, num_workers=1, batch_size=1)]
    """,
}
"""Name: the body of a function; what it returns is the same in a new and in a forked process."""

DEFINITIONS = """
class Box:
    def __init__(self, value): self.value = value
def double(box): return Box(box.value * 2)
"""

SEEDS = """
    import random, multiprocessing, uuid, tempfile
    import numpy
    return (torch.initial_seed(), random.random(), float(numpy.random.rand()), float(torch.rand(1)),
            bytes(multiprocessing.current_process().authkey), uuid.uuid4().hex)
"""


@pytest.fixture
def both(start):
    """both(*arguments, **environment): a launch with either method, at the same time, to their ends."""

    def to_the_end(*arguments: object, **environment: str) -> list:
        launches = [start(f"--start-method={method}", *arguments, RUN=method, **environment) for method in METHODS]
        return [launch.wait() for launch in launches]

    return to_the_end


@pytest.fixture
def observe(both, tmp_path, monkeypatch):
    """What each rank sees, with either method."""
    monkeypatch.chdir(tmp_path)

    def observed(body: str, ranks: int = 1, **environment: str) -> dict[str, list[str]]:
        script = tmp_path / "worker.py"
        script.write_text(OBSERVE.format(body=body, definitions=DEFINITIONS))
        options = (f"--nproc-per-node={ranks}", "--rdzv-id=same")
        seen = {}
        for method, finished in zip(
            METHODS, both(*options, script, "-a", "b c", LOGLEVEL="DEBUG", **environment), strict=True
        ):
            assert finished.returncode == 0, finished.output
            forked = finished.stderr.count("hyperpodrun: forked")
            assert forked == (ranks if method == "standby" else 0), finished.output
            seen[method] = [(tmp_path / f"seen.{method}.{rank}").read_text() for rank in range(ranks)]
        return seen

    return observed


def indent(body: str) -> str:
    return "".join(f"    {line}\n" for line in body.strip("\n").splitlines() if line.strip())


def outcomes(observe) -> dict[str, list[dict[str, str]]]:
    """By method and rank: the random numbers, and on rank 0 all points."""
    # Each point's result as text, so that objects compare by what they show.
    functions = "".join(f"    def {name}():\n" + indent(body) for name, body in {**EQUAL, "seeds": SEEDS}.items())
    points = "{" + ", ".join(f"{name!r}: repr({name}())" for name in EQUAL) + "}"
    body = f"{functions}    drawn = {{'seeds': repr(seeds())}}\n"
    body += f"    return drawn if os.environ['RANK'] == '1' else {{**drawn, **{points}}}\n"
    seen = observe(body, ranks=2, OMP_NUM_THREADS="2")
    return {method: [ast.literal_eval(text) for text in seen[method]] for method in METHODS}


@pytest.fixture(scope="module")
def seen():
    """What the first test of them has found."""
    return {}


@pytest.mark.parametrize("name", EQUAL)
def test_a_forked_worker_shows_what_a_new_process_shows(observe, seen, name):
    if not seen:
        seen.update(outcomes(observe))
    assert seen["standby"][0][name] == seen["spawn"][0][name]


@pytest.mark.parametrize("method", METHODS)
def test_every_worker_has_random_numbers_of_its_own(observe, seen, method):
    if not seen:
        seen.update(outcomes(observe))
    ranks = [ast.literal_eval(rank["seeds"]) for rank in seen[method]]
    for first, second in zip(*ranks, strict=True):
        assert first != second


ENDINGS = {
    "exit_code": "import sys; sys.exit(7)",
    "exit_text": "import sys; sys.exit('words')",
    "exit_none": "import sys; sys.exit(None)",
    "error": "def f():\n    raise ValueError('boom')\nf()",
    "syntax_error": "x = = 1",
    "interrupt": "raise KeyboardInterrupt",
    "own_hook": "import sys\nsys.excepthook = lambda *error: print('hook', error[0].__name__)\n1/0",
    "at_exit": "import atexit\natexit.register(print, 'bye')\nprint('unflushed', end='')",
    "thread": "import threading, time\nthreading.Thread(target=lambda: (time.sleep(.2), print('thread'))).start()",
    "fault": "import faulthandler, os\nfaulthandler.enable()\nos.abort()",
    "sigterm": "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)",
}


SUCCEEDS = ("exit_none", "at_exit", "thread")


def told(finished, attempt: int, rank: int = 0) -> list[str]:
    """What a worker has written."""
    (directory,) = finished.log_dir.glob(f"*/attempt_{attempt}/{rank}")
    texts = [(directory / f"{stream}.log").read_text() for stream in ("stdout", "stderr")]
    texts[1] = re.sub("0x[0-9a-f]+", "ADDRESS", texts[1].partition("\n\nExtension modules")[0]).strip()
    return texts


def test_a_forked_worker_fails_like_a_new_process(run, script, monkeypatch, tmp_path):
    """Each way in an attempt of its own: what runs before training lays the next script in its place."""
    monkeypatch.chdir(tmp_path)
    names = [name for name in ENDINGS if name not in SUCCEEDS]
    for number, name in enumerate(names):
        script(f"if True:\n  pass\n# import torch\nimport os\n{ENDINGS[name]}\nimport torch\n", f"ending.{number}")
    before = tmp_path / "before.sh"
    before.write_text("#!/bin/sh\ncp ending.$JOB_RESTART_COUNT worker.py\n")
    before.chmod(0o755)
    options = [f"--max-restarts={len(names) - 1}", "-r3", "--pre-train-script", before]
    ends: dict[str, dict[str, object]] = {}
    for method in METHODS:
        path = script("import torch\n")
        finished = run(f"--start-method={method}", *options, path, LOGLEVEL="DEBUG")
        assert finished.returncode == 1, finished.output
        assert finished.stderr.count("hyperpodrun: forked") == (len(names) if method == "standby" else 0)
        how = re.findall(r'^hyperpodrun: (?:restart .*cause|failed .*reason)="([^"]*)"', finished.stderr, re.MULTILINE)
        assert len(how) == len(names), finished.output
        ends[method] = {name: (how[number], told(finished, number)) for number, name in enumerate(names)}
    for name in names:
        assert ends["standby"][name] == ends["spawn"][name]


def test_a_forked_worker_succeeds_like_a_new_process(run, script, monkeypatch, tmp_path):
    """Each way on a rank of its own."""
    monkeypatch.chdir(tmp_path)
    body = "# import torch\nimport os\n"
    for rank, name in enumerate(SUCCEEDS):
        body += f"if os.environ['RANK'] == '{rank}':\n{indent(ENDINGS[name])}"
    ends = {}
    for method in METHODS:
        options = (f"--start-method={method}", "-r3", f"--nproc-per-node={len(SUCCEEDS)}")
        finished = run(*options, script(body + "if os.environ['RANK'] == '9':\n    import torch\n"))
        assert finished.returncode == 0, finished.output
        ends[method] = [told(finished, 0, rank) for rank in range(len(SUCCEEDS))]
    assert ends["standby"] == ends["spawn"]
    assert [stdout for stdout, _ in ends["spawn"]] == ["", "unflushedbye\n", "thread\n"]


@pytest.mark.parametrize("kind", ["module", "package", "directory", "symlink"])
def test_all_ways_to_name_a_script(both, monkeypatch, tmp_path, kind):
    monkeypatch.chdir(tmp_path)
    text = (
        "import torch, sys, os\n"
        "print(repr((__name__, __package__, getattr(__spec__, 'name', None), __file__, sys.argv, sys.path[:2])))\n"
        "import local_names; print(local_names.__file__)\n1/0\n"
    )
    package = tmp_path / "pack"
    package.mkdir()
    (package / "__init__.py").touch()
    for directory in (tmp_path, package):
        (directory / "local_names.py").touch()
    (package / "__main__.py").write_text(text)
    (package / "inner.py").write_text(text)
    (tmp_path / "link.py").symlink_to(package / "inner.py")
    arguments = {
        "module": ["-m", "pack.inner"],
        "package": ["-m", "pack"],
        "directory": ["pack"],
        "symlink": ["link.py"],
    }
    said = []
    launches = both("--redirects=2", *arguments[kind], "arg", LOGLEVEL="DEBUG")
    for method, finished in zip(METHODS, launches, strict=True):
        assert finished.stderr.count("hyperpodrun: forked") == (method == "standby"), finished.output
        (errors,) = finished.log_dir.glob("*/attempt_0/0/stderr.log")
        said.append((finished.stdout, errors.read_text()))
    assert said[0] == said[1]
    assert "ZeroDivisionError" in said[0][1].splitlines()[-1]


def test_modules_beside_the_script_shadow_others_in_both(observe, tmp_path):
    (tmp_path / "colorsys.py").write_text("mine = True")
    body = "    import colorsys\n    return getattr(colorsys, 'mine', False)"
    assert observe(body) == {"spawn": ["True"], "standby": ["True"]}


def test_preloaded_modules_are_there_and_torch_is_imported_once(run, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "heavy.py").write_text("import os\nopen('imported', 'a').write('x')\nmaker = os.getpid()")
    body = "import torch, os, sys\nprint('heavy' in sys.modules)\nimport heavy\nassert heavy.maker != os.getpid()"
    finished = run("--nproc-per-node=3", "--preload=heavy", script(body))
    assert finished.returncode == 0, finished.output
    assert finished.stdout.count("True") == 3
    assert (tmp_path / "imported").read_text() == "x"


@pytest.mark.parametrize("preload", ["no_such_module", "raises", "threads"])
def test_a_source_that_cannot_be_one_costs_a_line_and_nothing_else(run, script, tmp_path, monkeypatch, preload):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raises.py").write_text("raise SystemExit(3)")
    (tmp_path / "threads.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    )
    body = "import sys\nprint('ran')\nif len(sys.argv) > 1:\n    import torch  # for the source to be wanted\n"
    finished = run("--nproc-per-node=2", f"--preload={preload}", script(body), OMP_NUM_THREADS="1")
    assert finished.returncode == 0, finished.output
    assert finished.stdout.count("ran") == 2
    assert finished.stderr.count("hyperpodrun:") == 1, finished.output
    assert "standby-off" in finished.stderr


def test_a_rank_with_settings_of_its_own_is_started_cold(tmp_path, monkeypatch):
    from hyperpodrun.agent.config import LaunchConfig
    from hyperpodrun.agent.workers.standby import Launch, Standbys

    class Console:
        lines: list[tuple] = []  # noqa: RUF012

        def log(self, event: str, **fields: object) -> None:
            self.lines.append((event, fields))

        debug = log

    config = LaunchConfig(command=(sys.executable, "-u", str(tmp_path / "x.py")))
    standbys = Standbys(config, Console())  # type: ignore[arg-type]
    standbys.prepare({"A": "1", "OMP_NUM_THREADS": "1", "RANK": "0"})

    def same(**environment: str) -> bool:
        return standbys._same_for_source(Launch(config.command, environment, None, None, lambda child: None))

    assert same(A="2", OMP_NUM_THREADS="1", RANK="1", TORCHELASTIC_ERROR_FILE="x")
    assert not same(A="1", OMP_NUM_THREADS="2")
    assert Console.lines == [("cold-start", {"reason": "own settings", "names": "OMP_NUM_THREADS"})]
    assert not same(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="3")


def test_a_setting_made_before_torch_is_imported_counts_as_in_a_new_process(run, script):
    path = script(
        "import os\nos.environ.update(PYTORCH_JIT='0', OMP_NUM_THREADS='1')\nimport torch\n"
        "print(torch.jit._state._enabled.enabled, torch.get_num_threads())"
    )
    finished = run(path)
    assert finished.stdout == "False 1\n", finished.output
    assert f'standby-off reason="{path}, line 2 changes ' in finished.stderr


def test_one_that_no_text_shows_is_never_too_late_in_silence(run, script):
    path = script(
        "import importlib.util, os, sys\nassert importlib.util.find_spec('torch') is not None\n"
        "assert 'torch' not in sys.modules\nhidden = vars(os)['env' + 'iron']\n"
        "hidden.update(HOME='/', NCCL_DEBUG='WARN', PYTORCH_NVML_BASED_CUDA_CHECK='1')\nimport numpy\nprint('here')\n"
        "hidden['FX_PATCH_GETITEM'] = '1'\nfrom torch.nn import Linear\nprint('never')"
    )
    finished = run(path)
    assert (finished.returncode, finished.stdout) == (1, "here\n"), finished.output
    assert "FX_PATCH_GETITEM was changed before `import torch`" in finished.stderr
    assert "--start-method=spawn" in finished.stderr


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (
            "getattr(os, 'put' + 'env')('OMP_NUM_THREADS', '2')",
            "OMP_NUM_THREADS",
        ),  # libraries see it, os.environ does not
        ("vars(os)['env' + 'iron']['NPY_DISABLE_CPU_FEATURES'] = 'X86_V4'", "NPY_DISABLE_CPU_FEATURES"),
    ],
)
def test_what_only_c_libraries_read_is_noticed(run, script, change: str, name: str):
    finished = run(script(f"import os\n{change}\nimport numpy, torch\nprint('never')"))
    assert (finished.returncode, finished.stdout) == (1, ""), finished.output
    assert f"{name} was changed before `import numpy`" in finished.stderr


def test_scripts_without_torch_have_no_source(run, script):
    finished = run(script("import os, json\nprint(1)"), LOGLEVEL="DEBUG")
    assert finished.returncode == 0
    assert "standby" not in finished.stderr
    assert json.loads(finished.stdout) == 1
    assert os.environ.get("HYPERPODRUN_STANDBY_OPTIONS") is None
