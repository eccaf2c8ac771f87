"""What a training loop sees: the batches of the user's loader, in order, from any position on."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import sources
import torch
from family import producer_of, wait_for
from hyperpodrun import MMAPDataLoader, PassthroughMMAPConfig
from hyperpodrun.dataloader.errors import (
    BatchTypeError,
    ProducerError,
    SkipLimitError,
    StreamTakenError,
)

part = functools.partial


def plain(value: Any) -> Any:
    """Batches as something `==` compares."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def indices(batches: Any) -> list[list[int]]:
    return [batch[0].tolist() for batch in batches]


# ---- order ---------------------------------------------------------------------------------------------------------


def test_the_first_epoch_is_in_the_order_of_the_users_own_loader(load):
    assert indices(load(sources.shuffled)) == indices(sources.shuffled())
    assert indices(load(part(sources.distributed, 1, 2), name="d")) == indices(sources.distributed(1, 2))
    assert plain(list(load(sources.by_key, name="k"))) == plain(list(sources.by_key()))
    assert [int(b[0]) for b in load(sources.without_batches, name="w")] == [3, 4, 5]


def test_every_epoch_has_its_own_order_and_the_same_one_whoever_makes_it(load):
    loader = load(sources.shuffled, seed=1)
    epochs = [plain(list(loader)) for _ in range(3)]
    assert len(loader) == 25
    assert [len(epoch) for epoch in epochs] == [25, 25, 25]
    assert sorted(map(tuple, indices_of(epochs[0]))) != sorted(map(tuple, indices_of(epochs[1])))
    again = load(part(sources.shuffled, workers=0), name="other", seed=1)
    assert [plain(list(again)) for _ in range(3)] == epochs
    differently = load(sources.shuffled, name="seed", seed=2)
    assert indices_of(plain(list(differently))) == indices_of(epochs[0])  # its generator is the user's
    assert plain(list(differently)) != epochs[1]


def indices_of(batches: Any) -> list[list[int]]:
    return [batch[0] for batch in batches]


def test_a_sampler_that_shuffles_by_epoch_is_told_the_epoch(load):
    loader = load(part(sources.distributed, 0, 2))
    own = sources.distributed(0, 2)
    for epoch in range(3):
        own.sampler.set_epoch(epoch)
        assert indices(loader) == indices(own)


def test_a_loader_without_generator_depends_on_the_seed_only(load):
    first, second, third = (
        plain(list(load(sources.shuffled_by_default, name=name, seed=seed)))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == second != third


def test_torchs_seed_is_the_streams_seed(load):
    torch.manual_seed(1234)
    loader = load(sources.shuffled_by_default)
    assert loader.state_dict()["seed"] == 1234
    torch.manual_seed(99)
    assert load(sources.shuffled_by_default).state_dict()["seed"] == 1234  # a stream keeps its first


def test_breaking_off_begins_the_next_epoch(load):
    loader = load(sources.shuffled)
    for _ in zip(loader, range(3), strict=False):
        pass
    assert len(list(loader)) == 25
    assert loader.state_dict()["epoch"] == 2


def test_an_older_iterator_cannot_be_used(load):
    loader = load(sources.shuffled)
    old = iter(loader)
    next(old)
    next(iter(loader))
    with pytest.raises(RuntimeError, match="iterated anew"):
        next(old)


def test_batches_of_more_indices_than_a_packet_holds(load):
    batches = plain(list(load(sources.wide)))
    assert [batch[1] for batch in batches] == [50_000] * 3
    assert batches[2][0] == sum(range(100_000, 150_000))


def test_everything_that_may_be_in_a_batch_comes_back(load):
    (batch,) = load(sources.of_everything)
    assert type(batch["pair"]).__name__ == "Pair"
    assert plain(batch) == {"pair": [1, [1.0, 1.0]], "text": ["a", None], "deep": {"x": [1.5, True, b"z"]}}


def test_a_batch_can_be_changed_in_place_and_nobody_sees_it(load):
    first, second = load(sources.shuffled, seed=1), load(sources.shuffled, seed=1, name="b")
    del second
    batch = next(iter(first))
    before = batch[1].clone()
    batch[1].add_(100)
    first.seek(0)
    assert torch.equal(next(iter(first))[1], before)


# ---- resuming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "length"),
    [("shuffled", 25), ("shuffled_by_default", 10), ("stream", 10), ("stateful_loader", 15), ("stateful_both", 20)],
)
def test_any_position_is_reached_and_followed_by_the_same_batches(load, source, length):
    factory = getattr(sources, source)
    loader = load(factory, seed=3)
    expected: list[Any] = []
    states = []
    for _ in range(2):
        for batch in loader:
            expected.append(plain(batch))
            states.append(loader.state_dict())
    assert len(expected) == 2 * length
    positions = (0, 1, 7, length - 1, length, length + 3)
    for k in positions:
        fresh = load(factory, seed=3, name=f"fresh{k}")
        fresh.seek(k)
        batches = iter(fresh)
        assert plain(next(batches)) == expected[k], k
        if (k + 1) % length:
            assert plain(next(batches)) == expected[k + 1], k
        restored = load(factory, name=f"restored{k}")
        restored.load_state_dict(states[k])
        following = plain(next(iter(restored), None))
        assert following == (expected[k + 1] if (k + 1) % length else None), k  # the epoch's end comes first


def test_resuming_makes_no_batch_before_the_position(load, tmp_path):
    log = tmp_path / "samples"
    loader = load(part(sources.counting, str(log)), prefetch_length=2)
    loader.seek(900)
    batch = next(iter(loader))
    made = set(map(int, log.read_text().split()))
    assert set(batch[0].tolist()) <= made
    assert len(made) <= 4 * 5  # the batch, two ahead, two begun


def test_a_seekable_sampler_gets_to_the_far_end_at_once(load):
    loader = load(sources.seekable)
    loader.seek((1 << 38) - 2)
    assert indices(loader) == [[(1 << 40) - 8 + i for i in range(4)], [(1 << 40) - 4 + i for i in range(4)]]


def test_an_iterable_without_state_is_skipped_forward_and_says_so(load):
    loader = load(sources.stream)
    loader.seek(7)
    assert indices(loader)[0] == [21, 22, 23]
    assert loader.skipped is not None
    assert (loader.skipped.batches, loader.skipped.how) == (7, "making them and throwing them away")


def test_a_skip_has_a_limit(load):
    loader = load(sources.stream, max_skip_batches=5)
    loader.seek(7)
    with pytest.raises(SkipLimitError, match="7 batches before it, more than max_skip_batches=5"):
        next(iter(loader))


def test_positions_are_found_across_epochs_of_unknown_length(load):
    loader = load(sources.stream)  # 10 batches per epoch, which it does not know
    loader.seek(23)
    assert indices(loader)[0] == [2009, 2010, 2011]
    assert loader.state_dict()["epoch"] == 3
    with pytest.raises(TypeError, match="has no length"):
        len(loader)


def test_a_stateful_dataset_goes_on_from_its_state(load, tmp_path):
    log = tmp_path / "records"
    loader = load(part(sources.stateful_stream, str(log)), prefetch_length=1, lookback_length=0)
    batches = iter(loader)
    for _ in range(10):
        next(batches)
    state = loader.state_dict()
    assert state["source"] == {"next": 30}
    loader.close()
    log = tmp_path / "records after the restart"
    other = load(part(sources.stateful_stream, str(log)), name="other", prefetch_length=1)
    other.load_state_dict(state)
    assert next(iter(other))[0].tolist() == [30, 31, 32]
    assert min(map(int, log.read_text().split())) == 30


def test_a_state_survives_serialisation_and_nonsense_is_refused(load, tmp_path):
    loader = load(sources.shuffled)
    batches = iter(loader)
    next(batches)
    torch.save(loader.state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state")  # weights_only: plain data
    expected = plain(next(batches))
    loader.load_state_dict(state)
    assert plain(next(iter(loader))) == expected
    for nonsense in ({}, {"version": 99}, {"version": 1}, None, {**state, "epoch": -1}):
        with pytest.raises(ValueError, match=r"state of an MMAPDataLoader|position"):
            loader.load_state_dict(nonsense)
    for nonsense in (-1, 1.5, True):
        with pytest.raises(ValueError, match="whole number"):
            loader.seek(nonsense)


def test_a_checkpoint_of_another_seed_makes_the_stream_anew(load):
    loader = load(sources.shuffled_by_default, seed=1)
    batches = iter(loader)
    next(batches)
    state, expected = loader.state_dict(), plain(next(batches))
    other = load(sources.shuffled_by_default, name="other", seed=2)
    assert plain(next(iter(other))) != expected
    other.load_state_dict(state)
    assert plain(next(iter(other))) == expected


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["builtin", "own", "key"])
def test_an_error_in_the_dataset_comes_at_its_batch_with_its_traceback(load, how):
    loader = load(part(sources.broken, 9, how))
    batches = iter(loader)
    assert indices([next(batches), next(batches)]) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    kind = {"builtin": ValueError, "own": RuntimeError, "key": KeyError}[how]
    with pytest.raises(kind) as caught:
        next(batches)
    text = str(caught.value)
    assert "batch 2 of epoch 0" in text
    assert "in __getitem__" in text
    assert "sources.py" in text
    assert indices(batches)[0] == [12, 13, 14, 15]  # as with torch's loader, the next one can be asked for


def test_an_error_is_tried_again_after_a_restart(load, tmp_path):
    mended = tmp_path / "mended"
    factory = part(sources.broken, 9, "builtin", str(mended))
    loader = load(factory)
    loader.seek(2)
    batches = iter(loader)
    with pytest.raises(ValueError, match="sample 9 is broken"):
        next(batches)
    assert indices([next(batches)]) == [[12, 13, 14, 15]]
    mended.touch()
    again = load(factory)
    again.seek(2)
    assert indices(again)[0] == [8, 9, 10, 11]


def test_an_iterable_that_fails_does_not_end_its_epoch_quietly(load):
    loader = load(part(sources.stream, 30, 10))
    batches = iter(loader)
    assert [len(next(batches)[0]) for _ in range(3)] == [3, 3, 3]
    for _ in range(3):
        with pytest.raises(ValueError, match="record 10 is broken"):
            next(batches)


def test_what_cannot_be_in_a_batch_is_refused_by_its_type(load):
    loader = load(part(sources.broken, 1, "type"))
    with pytest.raises(BatchTypeError, match=r"batch\[1\]\[0\] is builtins\.object"):
        next(iter(loader))


def test_a_dataset_that_dies_is_an_error_at_its_batch(load):
    loader = load(part(sources.broken, 9, "kill"))
    batches = iter(loader)
    next(batches), next(batches)
    with pytest.raises(ProducerError, match=r"batch 2 of epoch 0 .* has died three times, the last time by signal 9"):
        next(batches)


def test_an_error_in_the_factory_is_the_loops(load):
    with pytest.raises(FileNotFoundError, match=r"no such corpus"):
        len(load(sources.failing))
    with pytest.raises(RuntimeError, match="the corpus is not licensed"):
        next(iter(load(sources.leaving, name="leaving")))


def test_a_factory_that_cannot_travel_is_refused_at_once():
    with pytest.raises(ProducerError, match="a lambda or a nested function"):
        MMAPDataLoader(lambda: None)


def test_two_loaders_of_one_name_are_told_apart(load):
    loader = load(sources.shuffled)
    next(iter(loader))
    other = load(part(sources.shuffled, seed=6))
    with pytest.raises(StreamTakenError, match="another loader factory, or with other arguments"):
        next(iter(other))
    with pytest.raises(StreamTakenError, match="with and without enable_batch_encryption"):
        next(iter(load(sources.shuffled, enable_batch_encryption=True)))
    twin = load(sources.shuffled)
    twin_batches = iter(twin)
    next(twin_batches)
    unread = iter(loader)
    next(twin_batches)
    del unread  # nobody is told, and nothing is raised where nobody can catch it
    with pytest.raises(StreamTakenError, match="is read by a newer MMAPDataLoader of this process"):
        list(loader)


def test_a_distributed_sampler_without_rank_gets_a_hint(load):
    with pytest.raises((ValueError, RuntimeError), match="num_replicas= and rank="):
        next(iter(load(no_rank)))


def no_rank() -> Any:
    from torch.utils.data import DistributedSampler

    data = sources.Numbers(8)
    return torch.utils.data.DataLoader(data, sampler=DistributedSampler(data))


def test_batches_that_take_too_long_are_an_error_that_says_which(load):
    loader = load(part(sources.numbers, slow_s=60.0), batch_timeout=0.3)
    with pytest.raises(ProducerError, match=r"batch 0 of epoch 0 of stream '.*' was not ready within 0.3 s"):
        next(iter(loader))


# ---- without a cache -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source", ["shuffled", "shuffled_by_default", "stream", "stateful_loader", "stateful_both", "without_batches"]
)
def test_without_a_cache_order_and_positions_are_the_same(load, source):
    factory = getattr(sources, source)
    cached = load(factory, seed=3)
    direct = MMAPDataLoader(factory, PassthroughMMAPConfig(), seed=3)
    for _ in range(2):
        assert [plain(b)[0] if source != "without_batches" else int(b[0]) for b in direct] == [
            plain(b)[0] if source != "without_batches" else int(b[0]) for b in cached
        ]
    for loader in (cached, direct):
        loader.load_state_dict(loader.state_dict())
        loader.seek(2)
    assert plain(next(iter(direct)))[0] == plain(next(iter(cached)))[0]


# ---- sharing -------------------------------------------------------------------------------------------------------


def test_readers_of_one_stream_share_one_producer_and_one_copy(load, monkeypatch):
    for name, value in (("MASTER_ADDR", "here"), ("MASTER_PORT", str(os.getpid())), ("RANK", "0")):
        monkeypatch.setenv(name, value)  # without hyperpodrun, this is what tells that processes belong together
    loader = load(sources.shuffled, rank="tp", prefetch_length=4, lookback_length=1)
    producer = producer_of(loader)
    expected = plain(list(loader))
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:  # a tensor-parallel peer; it has its own connection
        try:
            peer = MMAPDataLoader(loader._factory, loader._config, name=loader.stream[: -len("-tp")], data_rank="tp")
            batches = plain(list(peer))
            same = batches == expected and peer._opened().pid == producer
            os.write(write, b"1" if same else b"0")
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 1) == b"1"
    directory = Path(loader._opened().directory)
    wait_for(lambda: len(list(directory.glob("*.safetensors"))) <= 4 + 1)


def test_readers_that_come_at_once_get_one_producer(load, monkeypatch):
    for name, value in (("MASTER_ADDR", "at once"), ("MASTER_PORT", str(os.getpid())), ("RANK", "0")):
        monkeypatch.setenv(name, value)  # there is no host of this job yet: they race to start it
    said, say = os.pipe()
    wait, release = os.pipe()
    peers = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                os.close(release)
                os.write(say, b"%d\n" % producer_of(load(sources.shuffled, rank="shared")))
                os.read(wait, 1)  # the host lives as long as one of them
            finally:
                os._exit(0)
        peers.append(pid)
    os.close(say)
    producers = set()
    with os.fdopen(said) as lines:
        for _ in peers:
            producers.add(lines.readline())
        os.close(release)
    for pid in peers:
        os.waitpid(pid, 0)
    assert len(producers) == 1
    assert producers.pop().strip().isdecimal()
