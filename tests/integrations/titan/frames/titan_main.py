"""A script of somebody's own: the example's configuration, and a loop that is torchtitan's."""

import os
import sys
import tempfile

import train
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS
from torchtitan.tools.logging import init_logger


def config():
    assets = tempfile.mkdtemp(dir=sys.argv[2])
    train.make_tokenizer(assets)
    return train.configure(train.parse(), assets)


# <snippet>


if __name__ == "__main__":
    train.torch.set_num_threads(1)
    DATASETS["words"] = DatasetConfig(path="", loader=train.make_data, sample_processor=lambda sample: sample["text"])
    init_logger()
    main()
    train.torch.distributed.destroy_process_group()
