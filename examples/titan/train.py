"""Train torchtitan's debug model so that faults do not change the result, not in the last bit.

    hyperpodrun --nproc-per-node=4 --inprocess-restart train.py
    hyperpodrun verify --nproc-per-node=4 train.py          # with faults, and compares
    torchrun --nproc-per-node=4 train.py

Needs torchtitan 0.3 and triton (`pip install 'hyperpodrun[titan]'`), and no GPU. The lines with a number make it
recoverable. A plain torchtitan job needs none of them: it is launched with `-m hyperpodrun.integrations.torchtitan`
instead of `-m torchtitan.train`.
"""

import argparse
import json
import os
import random
import tempfile

import cpu  # before torchtitan
import torch
from datasets import Dataset
from hyperpodrun.integrations.torchtitan import recoverable  # 1
from tokenizers import Tokenizer, models, pre_tokenizers
from torchtitan.components.validate import Validator
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataLoader
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.tools.logging import init_logger
from torchtitan.trainer import Trainer

VOCABULARY = ["<unk>", "<s>", "</s>", *(f"word{number}" for number in range(2000))]


@recoverable  # 2
def main(args: argparse.Namespace) -> None:
    """As torchtitan.train.main: builds a trainer and trains."""
    with tempfile.TemporaryDirectory() as assets:
        make_tokenizer(assets)
        trainer = configure(args, assets).build()
    trainer.train()
    trainer.close()


def make_tokenizer(folder: str) -> None:
    """One token a word."""
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    with open(os.path.join(folder, "tokenizer_config.json"), "w") as file:
        json.dump({"bos_token": "<s>", "eos_token": "</s>"}, file)


def make_data(_: str) -> Dataset:
    """The same in every process: torchtitan gives each rank its part."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(VOCABULARY[3:], k=draw.randrange(20, 80))) for _ in range(400)]
    return Dataset.from_dict({"text": texts})


def configure(args: argparse.Namespace, assets: str) -> Trainer.Config:
    """torchtitan's debug model, small enough for a processor."""
    config = cpu.prepare(llama3_debugmodel())
    config.hf_assets_path, config.dump_folder = assets, args.folder
    config.debug.seed, config.debug.deterministic = 1, True
    config.dataloader.dataset, config.dataloader.num_workers = "words", args.workers
    config.training.steps, config.training.seq_len = args.steps, 32
    config.training.local_batch_size, config.training.global_batch_size = 2, args.global_batch_size
    config.parallelism.data_parallel_replicate_degree = args.replicate
    config.parallelism.data_parallel_shard_degree = -1
    config.checkpoint.enable, config.checkpoint.interval = args.save_every > 0, max(args.save_every, 1)
    if args.load_from:
        config.checkpoint.initial_load_path, config.checkpoint.initial_load_model_only = args.load_from, False
    config.metrics.enable_tensorboard = args.tensorboard
    if args.validate_every:
        data = HuggingFaceTextDataLoader.Config(dataset="words", infinite=False)
        config.validator = Validator.Config(enable=True, freq=args.validate_every, steps=2, dataloader=data)
    return config


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--replicate", type=int, default=2, help="so many ranks hold the same, the others other shards")
    parser.add_argument("--global-batch-size", type=int, default=-1, help="twice 2 times the ranks accumulates once")
    parser.add_argument("--workers", type=int, default=0, help="processes that load data")
    parser.add_argument("--folder", default="outputs")
    parser.add_argument("--save-every", type=int, default=0)
    parser.add_argument("--load-from", help="the folder of a checkpoint to begin with")
    parser.add_argument("--validate-every", type=int, default=0)
    parser.add_argument("--tensorboard", action="store_true")
    return parser.parse_args()


def run() -> None:
    torch.set_num_threads(1)  # a sum that is split over threads rounds differently
    DATASETS["words"] = DatasetConfig(path="", loader=make_data, sample_processor=lambda sample: sample["text"])
    init_logger()
    main(parse())
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run()
