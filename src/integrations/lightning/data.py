"""MMAPDataModule: a Lightning data module whose batches are cached. HyperPod's names and meaning.

The user's data module lives in two places. In the training process it is asked for nothing but its attributes; in the
producer of each stream a copy of it (pickled, as a process started by multiprocessing gets it) is set up and asked for
its loader. So nothing opens a dataset in a process that was just restarted.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ...dataloader.config import CacheResumeMMAPConfig, MMAPConfig, PassthroughMMAPConfig
from ...dataloader.errors import ProducerError
from ...dataloader.loader import MMAPDataLoader
from ...dataloader.names import data_coordinate

_STAGES = {"train": "fit", "val": "fit", "test": "test", "predict": "predict"}
_NO_COPY = ("trainer", "_trainer", "_log_hyperparams")


def _base() -> type[Any]:
    """Lightning's own base class where it is installed: its trainer insists on it."""
    for module in ("lightning.pytorch", "pytorch_lightning"):
        try:
            found: type[Any] = __import__(module, fromlist=["LightningDataModule"]).LightningDataModule
        except ImportError:
            continue
        return found
    return object


class MMAPDataModule(_base()):  # type: ignore[misc]
    """Gives Lightning's trainer an MMAPDataLoader for each loader of `data_module`.

    `mmap_config`: CacheResumeMMAPConfig, or PassthroughMMAPConfig to use the data module's loaders as they are made.
    `parallel_state_util`: tells which data-parallel rank this process is, with Megatron's functions (`names.py`); None:
    Megatron's own state if there is one, else every rank is data-parallel. `is_data_loading_rank` is accepted for
    HyperPod's sake and not used: the producer loads, whoever reads first.
    `num_microbatches`: batches per optimizer step, to find the batch of a global step; None: what the trainer
    accumulates. `setup_in_worker`: also set the data module up here, for scripts that use what its setup makes. `name`
    tells data modules apart that are read at the same time.

    Attributes that this class does not have are those of `data_module`. It must be picklable. If its `*_dataloader`
    takes `target_load_step`, as HyperPod's do, it is given 0: the position is reached without it.
    """

    def __init__(
        self,
        data_module: Any,
        mmap_config: MMAPConfig | None = None,
        parallel_state_util: Any = None,
        is_data_loading_rank: Callable[[], bool] | None = None,
        *,
        num_microbatches: int | None = None,
        setup_in_worker: bool = False,
        seed: int | None = None,
        name: str = "",
    ) -> None:
        super().__init__()
        self.data_module = data_module
        self.mmap_config = CacheResumeMMAPConfig() if mmap_config is None else mmap_config
        self._parallel_state = parallel_state_util
        self._num_microbatches = num_microbatches
        self._setup_in_worker = setup_in_worker
        self._seed = seed
        self._name = f"{name}-" if name else ""
        self._loaders: dict[str, MMAPDataLoader] = {}
        self._train_state: Mapping[str, Any] | None = None
        self._global_step: int | None = None

    def __getattr__(self, name: str) -> Any:
        data_module = self.__dict__.get("data_module")
        if data_module is None or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(data_module, name)

    # ---- Lightning's hooks -------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Downloads and the like, once per node, as Lightning does it."""
        self.data_module.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Nothing to do here, unless `setup_in_worker`: the producers set up what they need."""
        if self._setup_in_worker:
            self.data_module.setup(stage)

    def teardown(self, stage: str | None = None) -> None:
        if self._setup_in_worker:
            self.data_module.teardown(stage)

    def train_dataloader(self) -> Any:
        """The training batches, from the restored position on."""
        loader = self._loader("train")
        if isinstance(loader, list):
            return loader
        if self._train_state is not None:
            loader.load_state_dict(self._train_state)
        elif self._global_step is not None:
            loader.seek(self._global_step * self._batches_per_step())
        self._train_state = self._global_step = None
        return loader

    def val_dataloader(self) -> Any:
        return self._loader("val")

    def test_dataloader(self) -> Any:
        return self._loader("test")

    def predict_dataloader(self) -> Any:
        return self._loader("predict")

    def state_dict(self) -> dict[str, Any]:
        """The training position, and the data module's own state."""
        state: dict[str, Any] = {"data_module": self.data_module.state_dict()}
        if "train" in self._loaders:
            state["train"] = self._loaders["train"].state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Before `train_dataloader` is asked for, as Lightning does it."""
        self.data_module.load_state_dict(state_dict.get("data_module", {}))
        self._train_state = state_dict.get("train")
        self._restore_now()

    def load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Training goes on after `checkpoint["global_step"]` optimizer steps."""
        self._global_step = int(checkpoint["global_step"])
        self._train_state = None
        self._restore_now()

    def _restore_now(self) -> None:
        """A loader that the trainer has already got goes there too."""
        loader = self._loaders.get("train")
        if loader is None:
            return
        if self._train_state is not None:
            loader.load_state_dict(self._train_state)
        elif self._global_step is not None:
            loader.seek(self._global_step * self._batches_per_step())

    def _batches_per_step(self) -> int:
        if self._num_microbatches is not None:
            return self._num_microbatches
        return int(getattr(self.__dict__.get("trainer"), "accumulate_grad_batches", 1) or 1)

    # ---- loaders -----------------------------------------------------------------------------------------------

    def _loader(self, name: str) -> Any:
        """An MMAPDataLoader, or a list of them where the data module gives several."""
        factory = functools.partial(_make_loader, _portable(self.data_module), name, self._sharding(), None)
        loader = self._make(factory, name)
        several = loader.loaders()
        if not several:
            self._loaders[name] = loader
            return loader
        loader.close()
        if name == "train":
            raise ProducerError("a data module with several training loaders cannot be resumed; combine them in one")
        return [
            self._make(functools.partial(factory.func, *factory.args[:3], number), f"{name}-{number}")
            for number in range(several)
        ]

    def _make(self, factory: Callable[[], Any], name: str) -> MMAPDataLoader:
        config = self.mmap_config
        if isinstance(config, CacheResumeMMAPConfig) and not name.startswith("train"):
            config = replace(
                config,
                prefetch_length=config.val_prefetch_length,
                checkpoint_frequency=None,
                model_parallel_group=None,
            )
        return MMAPDataLoader(
            factory,
            config,
            name=f"{self._name}{name}",
            data_rank=data_coordinate(self._parallel_state),
            seed=self._seed,
        )

    def _sharding(self) -> tuple[int, int] | None:
        """(rank, world size) where Lightning would put a DistributedSampler into a DataLoader: it cannot do so here."""
        trainer = self.__dict__.get("trainer") or getattr(self, "trainer", None)
        if trainer is None or getattr(trainer, "world_size", 1) == 1 or self._parallel_state is not None:
            return None
        connector = getattr(trainer, "_accelerator_connector", None)
        if not getattr(connector, "use_distributed_sampler", False):
            return None
        return int(trainer.global_rank), int(trainer.world_size)


def _portable(data_module: Any) -> Any:
    """The data module without the trainer that Lightning ties to it."""
    portable = copy.copy(data_module)
    for name in _NO_COPY:
        if portable.__dict__.get(name) is not None:
            portable.__dict__[name] = None
    return portable


def _make_loader(data_module: Any, name: str, sharding: tuple[int, int] | None, number: int | None) -> Any:
    """In the producer: sets the data module up and gives its loader, or the `number`-th of several."""
    data_module.setup(_STAGES[name])
    method = getattr(data_module, f"{name}_dataloader")
    takes_position = "target_load_step" in inspect.signature(method).parameters
    made = method(target_load_step=0) if takes_position else method()
    if isinstance(made, dict):
        raise TypeError(f"{name}_dataloader() gives a dict of loaders: give a list, or one loader")
    if isinstance(made, list | tuple):
        made = list(made) if number is None else made[number]
    if sharding is None or (number is None and isinstance(made, list)):
        return made
    return _sharded(made, *sharding, shuffled_by_lightning=name == "train")


def _sharded(loader: Any, rank: int, world_size: int, shuffled_by_lightning: bool) -> Any:
    """The loader with the DistributedSampler that Lightning would have given it."""
    from torch.utils.data import (
        BatchSampler,
        DataLoader,
        DistributedSampler,
        IterableDataset,
        RandomSampler,
        SequentialSampler,
    )

    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    if isinstance(loader.sampler, DistributedSampler):
        return loader
    plain = type(loader.sampler) in (RandomSampler, SequentialSampler)
    if not plain or type(loader.batch_sampler) is not BatchSampler:
        raise TypeError(
            f"a loader with {type(loader.batch_sampler).__name__} over {type(loader.sampler).__name__} cannot be "
            f"divided among {world_size} ranks: let the data module do so, and pass use_distributed_sampler=False to "
            "the trainer"
        )
    sampler: Any = DistributedSampler(
        loader.dataset,
        num_replicas=world_size,
        rank=rank,
        shuffle=isinstance(loader.sampler, RandomSampler),
        seed=int(os.environ.get("PL_GLOBAL_SEED", "0")),
    )
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if loader.num_workers else None,
    )


__all__ = ["CacheResumeMMAPConfig", "MMAPDataModule", "PassthroughMMAPConfig"]
