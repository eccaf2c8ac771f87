"""MMAPDataModule over data modules with Lightning's interface; tests/integrations/ runs it in Lightning itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import sources
import torch
from hyperpodrun import CacheResumeMMAPConfig, MMAPDataLoader, MMAPDataModule, PassthroughMMAPConfig
from hyperpodrun.dataloader.errors import ProducerError
from torch.utils.data import DataLoader, WeightedRandomSampler


class DataModule:
    """What Lightning's trainer uses of a LightningDataModule, with data that exists after setup only."""

    vocabulary = 50_000

    def __init__(self) -> None:
        self.trainer: Any = None
        self.prepared = False
        self.extra = 0

    def prepare_data(self) -> None:
        self.prepared = True

    def setup(self, stage: str) -> None:
        self.data = {
            name: sources.Numbers(40 if name == "train" else 12) for name in ("train", "val", "test", "predict")
        }
        self.stage = stage

    def train_dataloader(self) -> Any:
        return DataLoader(self.data["train"], batch_size=4, shuffle=True)

    def val_dataloader(self) -> Any:
        return [DataLoader(self.data["val"], batch_size=4), DataLoader(self.data["val"], batch_size=6)]

    def test_dataloader(self) -> Any:
        assert self.stage == "test"
        return DataLoader(self.data["test"], batch_size=3)

    def predict_dataloader(self) -> Any:
        return DataLoader(self.data["predict"], batch_size=2)

    def state_dict(self) -> dict[str, Any]:
        return {"extra": self.extra}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.extra = state["extra"]


class HyperPodDataModule(DataModule):
    """One written for HyperPod: positions itself."""

    def train_dataloader(self, target_load_step: int) -> Any:
        assert target_load_step == 0, "reached without making the batches before it"
        return super().train_dataloader()


class WeightedDataModule(DataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(self.data["train"], sampler=WeightedRandomSampler([1.0] * 40, 40))


class SeveralDataModule(DataModule):
    def train_dataloader(self) -> Any:
        return [super().train_dataloader()] * 2


@pytest.fixture
def module(tmp_path):
    made = []

    def make(data_module: Any = None, **options: Any) -> MMAPDataModule:
        config = CacheResumeMMAPConfig(
            cache_dir=str(tmp_path / f"cache-{len(made)}"), prefetch_length=5, val_prefetch_length=3, lookback_length=1
        )
        made.append(MMAPDataModule(data_module=data_module or DataModule(), mmap_config=config, **options))
        return made[-1]

    yield make
    for data in made:
        for loader in data._loaders.values():
            loader.close()


def numbers(batches: Any) -> list[int]:
    return [number for batch in batches for number in batch[0].tolist()]


def test_every_kind_of_loader_is_cached(module):
    data = module()
    data.prepare_data()
    data.setup("fit")
    train = data.train_dataloader()
    assert isinstance(train, MMAPDataLoader)
    assert len(train) == 10
    assert sorted(numbers(train)) == list(range(40))
    first, second = data.val_dataloader()
    lengths = [loader._open()._options.prefetch for loader in (train, first, data.test_dataloader())]
    assert lengths == [5, 3, 3]
    assert (len(first), len(second)) == (3, 2)
    assert numbers(first) == numbers(first) == numbers(second) == list(range(12))  # every epoch from the beginning
    assert numbers(data.test_dataloader()) == numbers(data.predict_dataloader()) == list(range(12))


def test_attributes_are_those_of_the_data_module_and_nothing_is_opened_here(module):
    data = module()
    data.prepare_data()
    data.setup("fit")
    assert data.vocabulary == 50_000
    assert data.prepared
    with pytest.raises(AttributeError, match="data"):
        _ = data.data
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = data.no_such_name
    here = module(setup_in_worker=True)
    here.setup("fit")
    assert len(here.data["train"]) == 40


def test_a_global_step_leads_to_its_batch(module):
    undisturbed = [
        batch[0].tolist() for epoch in range(2) for batch in module(seed=5).train_dataloader() for _ in [epoch]
    ]
    del undisturbed[10:]
    data = module(HyperPodDataModule(), seed=5)
    data.load_checkpoint({"global_step": 7})
    assert [batch[0].tolist() for batch in data.train_dataloader()] == undisturbed[7:]
    accumulating = module(seed=5, num_microbatches=2)
    accumulating.load_checkpoint({"global_step": 3})
    assert [batch[0].tolist() for batch in accumulating.train_dataloader()] == undisturbed[6:]


def test_a_checkpoint_holds_the_position_and_the_data_modules_own_state(module):
    data = module()
    data.data_module.extra = 5
    batches = iter(data.train_dataloader())
    for _ in range(4):
        next(batches)
    state = torch.load(saved(data.state_dict()))
    expected = numbers(batches)
    other = module()
    other.load_state_dict(state)
    assert other.data_module.extra == 5
    assert numbers(other.train_dataloader()) == expected
    live = module()
    loader = live.train_dataloader()
    live.load_state_dict(state)  # after the trainer has its loader
    assert numbers(loader) == expected


def saved(state: Any) -> Any:
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_ranks_share_the_data_as_lightning_would_have_them(module):
    read = []
    for rank in (0, 1):
        data = module()
        data.trainer = SimpleNamespace(
            world_size=2, global_rank=rank, accumulate_grad_batches=1,
            _accelerator_connector=SimpleNamespace(use_distributed_sampler=True),
        )  # fmt: skip
        loader = data.train_dataloader()
        assert len(loader) == 5
        read.append(set(numbers(loader)))
    assert not read[0] & read[1]
    assert len(read[0] | read[1]) == 40
    data = module(WeightedDataModule())
    data.trainer = SimpleNamespace(
        world_size=2, global_rank=0, _accelerator_connector=SimpleNamespace(use_distributed_sampler=True)
    )
    with pytest.raises(TypeError, match="let the data module do so, and pass use_distributed_sampler=False"):
        len(data.train_dataloader())


def test_several_training_loaders_are_refused(module):
    with pytest.raises(ProducerError, match="several training loaders"):
        module(SeveralDataModule()).train_dataloader()


def test_a_parallel_state_says_who_reads_what(module):
    state = SimpleNamespace(get_data_parallel_rank=lambda: 3, get_context_parallel_rank=lambda: 1)
    data = module(parallel_state_util=state)
    assert data.train_dataloader().stream == "train-dp3-cp1"
    assert module(parallel_state_util=state, name="math").train_dataloader().stream == "math-train-dp3-cp1"


def test_it_can_be_switched_off():
    data = MMAPDataModule(DataModule(), PassthroughMMAPConfig(), seed=5)
    data.load_checkpoint({"global_step": 7})
    batches = list(data.train_dataloader())
    assert len(batches) == 3
    assert [len(numbers(loader)) for loader in data.val_dataloader()] == [12, 12]


def test_the_config_refuses_nonsense():
    for name, value in (
        ("prefetch_length", 0),
        ("lookback_length", -1),
        ("checkpoint_frequency", 1.5),
        ("cache_dir", ""),
    ):
        with pytest.raises(ValueError, match=name):
            CacheResumeMMAPConfig(**{name: value})
    with pytest.raises(ValueError, match="batch_timeout"):
        CacheResumeMMAPConfig(batch_timeout=0)
    assert CacheResumeMMAPConfig().cache_dir == "/dev/shm/pdl_cache"
