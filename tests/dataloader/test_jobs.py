"""Whole jobs: room on disk, several jobs on one cache directory, and nothing left behind however they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import sources
from family import kill, marked, wait_for
from hyperpodrun.dataloader.storing.directories import JobDirectory, remove_dead_jobs

HERE = Path(__file__).parent

READER = f"""
import functools, json, os, signal, sys
sys.path.insert(0, {str(HERE)!r})
import sources
from hyperpodrun import CacheResumeMMAPConfig, MMAPDataLoader
from hyperpodrun.dataloader.errors import CacheFullError

def main(cache, seed=1, source=sources.shuffled, steps=None, **config):
    config = CacheResumeMMAPConfig(cache_dir=cache, batch_timeout=30, **config)
    loader = MMAPDataLoader(source, config, seed=seed)
    read = []
    for batch in loader:
        read.append([part.tolist() for part in batch])
        if steps is not None and len(read) == steps:
            print(json.dumps({{"pid": loader._opened().pid, "read": read}}), flush=True)
            signal.pause()
    print(json.dumps({{"pid": loader._opened().pid, "read": read}}), flush=True)
"""


def python(script: Path, *arguments: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], timeout: float = 60) -> str:
    stdout, stderr = process.communicate(timeout=timeout)
    assert process.returncode == 0, stdout + stderr
    return stdout


@pytest.fixture
def reader(script):
    return lambda call, name="reader.py": script(f"{READER}\nif __name__ == '__main__':\n    {call}\n", name)


# ---- room ----------------------------------------------------------------------------------------------------------


def on_small_disk(size: str, directory: Path, script: Path) -> str:
    """Runs a script where `directory` is a file system of that size, in a mount namespace of its own."""
    directory.mkdir()
    namespace = ["unshare", "--mount"] if os.getuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    mount = f"mount -t tmpfs -o size={size} none {directory} && exec {sys.executable} {script}"
    ended = subprocess.run([*namespace, "sh", "-c", mount], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_on_a_small_disk_preparing_waits_for_readers(reader, tmp_path):
    disk = tmp_path / "disk"
    source = "functools.partial(sources.large, 1, 12)"
    script = reader(f"main({str(disk / 'cache')!r}, source={source}, prefetch_length=10)")
    read = json.loads(on_small_disk("4500k", disk, script))["read"]
    assert [batch[0][0] for batch in read] == [float(i) for i in range(12)]


def test_a_full_disk_is_an_error_that_loses_nothing(reader, tmp_path):
    disk = tmp_path / "disk"
    script = reader(
        f"""
    filler = {str(disk / "filler")!r}
    with open(filler, "wb", buffering=0) as file:
        file.write(bytes(3 << 20))
    loader = MMAPDataLoader(
        functools.partial(sources.large, 1, 12), CacheResumeMMAPConfig(cache_dir={str(disk / "cache")!r}))
    batches = iter(loader)
    read, errors = [], []
    for _ in range(20):
        try:
            read.append(next(batches)[0][0].item())
        except StopIteration:
            break
        except CacheFullError as error:
            errors.append(str(error))
            os.unlink(filler)
    print(json.dumps([read, errors]))
"""
    )
    read, errors = json.loads(on_small_disk("3500k", disk, script))
    assert read == [float(i) for i in range(12)]
    assert len(errors) == 1
    assert "there is no room for batch" in errors[0]
    assert "choose another cache_dir, or lower prefetch_length" in errors[0]


# ---- other jobs ----------------------------------------------------------------------------------------------------


def test_two_jobs_on_one_cache_directory_read_their_own_data(reader, load, tmp_path):
    cache = tmp_path / "both"
    scripts = [
        reader(f"main({str(cache)!r}, seed={seed}, source=sources.shuffled_by_default)", f"{seed}.py")
        for seed in (1, 2)
    ]
    together = [python(script) for script in scripts]
    read = [json.loads(finish(process))["read"] for process in together]
    alone = [load(sources.shuffled_by_default, name=f"{seed}", seed=seed) for seed in (1, 2)]
    assert read == [[[part.tolist() for part in batch] for batch in loader] for loader in alone]
    assert read[0] != read[1]
    wait_for(lambda: not list(cache.iterdir()))


def test_caches_of_dead_jobs_are_removed_and_those_of_live_ones_are_not(reader, tmp_path):
    cache = tmp_path / "cache"
    live = JobDirectory(cache, "11111111")
    (live.path / "batch").touch()
    stale = cache / "job-22222222" / "train-dp0"
    stale.mkdir(parents=True)
    (stale / "0-0.safetensors").write_bytes(b"a batch of another run")
    (stale / "stream.json").write_text('{"version": 1}')
    foreign = cache / "notes"
    foreign.mkdir()
    read = json.loads(finish(python(reader(f"main({str(cache)!r})"))))["read"]
    assert len(read) == 25
    wait_for(lambda: sorted(path.name for path in cache.iterdir()) == ["job-11111111", "notes"])
    assert (live.path / "batch").exists()
    live.remove()
    assert remove_dead_jobs(cache) == []


# ---- ends ----------------------------------------------------------------------------------------------------------


def test_a_killed_process_without_launcher_leaves_nothing(reader, tmp_path):
    cache, mark = tmp_path / "cache", f"TEST_MARK=mark-{os.getpid()}-{os.urandom(4).hex()}"
    script = reader(f"main({str(cache)!r}, steps=3)")
    process = python(script, env={**os.environ, "TEST_MARK": mark.partition("=")[2]})
    assert process.stdout is not None
    process.stdout.readline()
    assert len(marked(mark)) >= 4  # itself, host, producer, fetchers
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not marked(mark))
    assert not list(cache.iterdir())


@pytest.mark.parametrize("how", ["agent killed", "interrupted"])
def test_a_job_leaves_no_process_and_no_cache(start, reader, tmp_path, how):
    cache, mark = tmp_path / "cache", f"TEST_MARK=mark-{os.getpid()}-{os.urandom(4).hex()}"
    launch = start("--nproc-per-node=2", reader(f"main({str(cache)!r}, steps=3)"), TEST_MARK=mark.partition("=")[2])
    wait_for(lambda: len(list(cache.glob("job-*/*/0-2.safetensors"))) == 2, timeout=60)
    if how == "agent killed":
        kill(launch.pid)
    else:
        launch.process.send_signal(signal.SIGTERM)
        launch.wait()
    wait_for(lambda: not marked(mark))
    wait_for(lambda: not list(cache.iterdir()))


def test_under_torchrun_the_producer_outlives_a_restart_and_dies_with_torchrun(reader, tmp_path):
    cache, mark = tmp_path / "cache", f"TEST_MARK=mark-{os.getpid()}-{os.urandom(4).hex()}"
    script = reader(
        f"""
    loader = MMAPDataLoader(sources.shuffled, CacheResumeMMAPConfig(cache_dir={str(cache)!r}), seed=1)
    loader.seek(5 * int(os.environ["TORCHELASTIC_RESTART_COUNT"]))
    batches = iter(loader)
    for _ in range(5):
        batch = next(batches)
    print("producer", loader._opened().pid, batch[0].tolist(), flush=True)
    sys.exit(os.environ["TORCHELASTIC_RESTART_COUNT"] == "0")
"""
    )
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1", str(script)],
        capture_output=True, text=True, timeout=100, env={**os.environ, "TEST_MARK": mark.partition("=")[2]},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = [line.split() for line in ended.stdout.splitlines() if line.startswith("producer")]
    assert len(lines) == 2
    assert lines[0][1] == lines[1][1]
    wait_for(lambda: not marked(mark))
    assert not list(cache.iterdir())


def test_a_script_that_trains_when_it_is_imported_is_told_so(script, tmp_path):
    text = f"{READER}\ndef make():\n    return sources.shuffled()\nmain({str(tmp_path / 'cache')!r}, source=make)\n"
    process = python(script(text))
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert 'put what it does under `if __name__ == "__main__":`' in stderr


def test_the_gpt_example_ends_with_the_same_digest_with_a_cache(run, tmp_path):
    script = HERE.parents[1] / "examples" / "gpt" / "train.py"
    options = ("--nproc-per-node=2", "--inprocess-restart", script, "--steps=24", "--layers=1", "--width=32")
    cached = run(
        *options, f"--mmap-cache={tmp_path / 'cache'}", "--inject=raise:rank=1,step=8", "--inject=kill:rank=0,step=16"
    )
    assert cached.returncode == 0, cached.output
    assert len(cached.recoveries) == 2
    assert cached.digest == run(*options).digest
    assert not list((tmp_path / "cache").iterdir())
