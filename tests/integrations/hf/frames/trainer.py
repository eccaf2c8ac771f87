"""docs/frameworks.md: a Trainer."""

import os

import torch
from common import Sentences, build, digest, tell
from transformers import Trainer, TrainingArguments

os.chdir(os.environ["OUTCOME"])
torch.manual_seed(1)
settings = {"use_cpu": True, "report_to": [], "per_device_train_batch_size": 2, "dataloader_num_workers": 1}
train_dataset, eval_dataset = Sentences(50), Sentences(8)

# <snippet>

with open("out/model.safetensors", "rb") as saved:
    tell(weights=digest(saved.read()))
