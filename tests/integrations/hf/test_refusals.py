"""What a recoverable function cannot do is refused in one sentence. One process, no launcher."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hyperpodrun import UnsupportedStateError
from hyperpodrun.integrations import accelerate as loops
from hyperpodrun.integrations import hf
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parent / "workers"))
from common import Sentences, build

pytestmark = pytest.mark.filterwarnings("ignore:HPWrapper")


def trainer(directory: Path, **settings) -> Trainer:
    arguments = TrainingArguments(str(directory), use_cpu=True, max_steps=1, report_to=[], **settings)
    return Trainer(build(), arguments, train_dataset=Sentences(8))


def test_a_second_training_in_one_function(tmp_path):
    @hf.recoverable
    def main():
        trainer(tmp_path).train()
        trainer(tmp_path).train()

    with pytest.raises(UnsupportedStateError, match="begins a second training"):
        main()


def test_a_trainer_in_place_of_a_function(tmp_path):
    with pytest.raises(TypeError, match="takes the function that makes and runs the training, not a Trainer"):
        hf.recoverable(trainer(tmp_path))


def test_a_trainer_that_looks_for_its_batch_size(tmp_path):
    with pytest.raises(UnsupportedStateError, match="auto_find_batch_size"):
        hf.recoverable(lambda: trainer(tmp_path, auto_find_batch_size=True).train())()


def test_a_model_without_its_optimizer():
    with pytest.raises(UnsupportedStateError, match="a model without its optimizer"):
        loops.recoverable(lambda: Accelerator(cpu=True).prepare(torch.nn.Linear(1, 1)))()


def test_epochs_in_the_wrong_place():
    with pytest.raises(RuntimeError, match="belongs into a function under @recoverable"):
        loops.epochs([], 1)
    with pytest.raises(UnsupportedStateError, match="nothing to go on from yet"):
        loops.recoverable(lambda: loops.epochs([], 1))()


def test_a_loader_without_a_length():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from range(4)

    def main():
        model = torch.nn.Linear(1, 1)
        made = Accelerator(cpu=True).prepare(model, torch.optim.AdamW(model.parameters()), DataLoader(Endless()))
        loops.epochs(made[2], 1)

    with pytest.raises(UnsupportedStateError, match="the loader has no length"):
        loops.recoverable(main)()


def test_a_function_may_be_called_again_and_other_trainings_are_left_alone(tmp_path):
    @hf.recoverable
    def main():
        made = trainer(tmp_path)
        made.train()
        return made.state.global_step

    assert main() == main() == 1
    plain = trainer(tmp_path)
    plain.train()
    assert not hasattr(plain, "_hyperpodrun")
