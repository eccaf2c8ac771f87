"""Whatever is killed, the batches that a rank reads are those that it would have read."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
import time
from pathlib import Path

import fault_runs
import pytest
import sources
import torch
from family import fetchers_of, host_of, kill, producer_of, wait_for
from hyperpodrun.dataloader.errors import ProducerError
from test_loader import plain

part = functools.partial


@pytest.mark.parametrize("seed", [3, 5])
def test_seeded_runs_with_faults_read_what_the_undisturbed_run_reads(seed, tmp_path):
    """scripts/check-dataloader does fifty of them."""
    fault_runs.check(seed, tmp_path)


@pytest.mark.parametrize("victim", ["producer", "fetchers", "host"])
@pytest.mark.parametrize("source", ["shuffled", "stream", "stateful_both"])
def test_a_killed_process_changes_nothing(load, victim, source):
    factory = getattr(sources, source)
    expected = plain(list(load(factory, name="undisturbed", seed=1)))
    loader = load(factory, seed=1)
    batches = iter(loader)
    read = [plain(next(batches)) for _ in range(4)]
    producer = producer_of(loader)
    for pid in {"producer": [producer], "fetchers": fetchers_of(producer), "host": [host_of(producer)]}[victim]:
        kill(pid)
    read += [plain(batch) for batch in batches]
    assert read == expected


def test_what_lies_ready_is_read_while_a_new_producer_starts(load, tmp_path):
    gate = tmp_path / "gate"
    gate.touch()
    loader = load(part(gated, str(gate)), prefetch_length=6)
    batches = iter(loader)
    next(batches)
    connection = loader._open()

    def lies_ready() -> bool:
        """The reader has been told; that the files are there is not enough."""
        connection.hear(time.monotonic() + 0.01)
        return connection.until >= (0, 6)

    wait_for(lies_ready)
    gate.unlink()  # the next producer's factory does not return
    kill(producer_of(loader))
    for _ in range(5):
        next(batches)
    gate.touch()
    assert len(list(batches)) == 25 - 6


def gated(gate: str) -> object:
    wait_for(lambda: Path(gate).exists(), timeout=60)
    return sources.numbers()


def test_a_new_producer_uses_the_files_it_finds(load, tmp_path):
    log = tmp_path / "samples"
    loader = load(part(sources.counting, str(log)), prefetch_length=8)
    batches = iter(loader)
    next(batches)
    directory = Path(loader._opened().directory)
    wait_for(lambda: len(list(directory.glob("*.safetensors"))) >= 8)
    wait_for(lambda: len(log.read_text().split()) >= 8 * 4)
    kill(producer_of(loader))
    for _ in range(20):
        next(batches)
    made = log.read_text().split()
    assert len(made) - len(set(made)) <= 4 * 2, "batches that were there have been made again"  # two were begun


def test_producers_that_die_again_and_again_are_given_up(load):
    with pytest.raises(ProducerError, match=r"5 producers of stream .* died, one after the other"):
        len(load(suicidal))


def suicidal() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_reader_that_waits_is_served_by_the_next_producer(load):
    loader = load(part(sources.numbers, slow_s=0.2))
    producer = producer_of(loader)
    timer = threading.Timer(0.1, kill, [producer])
    timer.start()
    assert next(iter(loader))[0].tolist() == [0, 1, 2, 3]
    timer.join()
    assert producer_of(loader) != producer


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "missing", "other"])
def test_a_damaged_file_is_made_again_and_never_given_out(load, damage):
    expected = plain(list(load(sources.shuffled, name="undisturbed", seed=1)))
    loader = load(sources.shuffled, seed=1)
    batches = iter(loader)
    read = [plain(next(batches)) for _ in range(2)]
    file = Path(loader._opened().directory) / "0-4.safetensors"
    other = file.with_name("0-3.safetensors")
    wait_for(lambda: file.exists() and other.exists())  # fetchers work side by side
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
    elif damage == "other":
        content = bytearray(other.read_bytes())
    damaged = {"cut": content[:-100], "empty": b""}.get(damage, content)
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(damaged)
    read += [plain(batch) for batch in batches]
    assert read == expected


def test_sealed_batches_are_read_and_tell_nothing(load):
    expected = plain(list(load(sources.shuffled, name="open", seed=1)))
    loader = load(sources.shuffled, seed=1, enable_batch_encryption=True)
    batches = iter(loader)
    read = [plain(next(batches)) for _ in range(2)]
    key, file = loader._opened().key, Path(loader._opened().directory) / "0-3.safetensors"
    wait_for(file.exists)
    assert b"safetensors" not in file.read_bytes()
    assert file.read_bytes()[:8] == b"HPBATCH1"
    kill(producer_of(loader))  # the host knows the key
    read += [plain(batch) for batch in batches]
    assert read == expected
    for path in file.parent.iterdir():
        with contextlib.suppress(FileNotFoundError):  # the producer goes on writing and removing
            assert key not in path.read_bytes()


def test_files_are_the_users_own(load):
    torch.manual_seed(0)
    loader = load(sources.shuffled)
    next(iter(loader))
    directory = Path(loader._opened().directory)
    for path in (directory, directory.parent):
        assert path.stat().st_mode & 0o777 == 0o700
    modes = set()
    for file in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):  # the producer goes on writing and removing
            modes.add(file.stat().st_mode & 0o777)
    assert modes == {0o600}
