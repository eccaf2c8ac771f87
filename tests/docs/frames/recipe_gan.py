"""docs/recipes.md: two models with an optimizer each, which take turns."""

from types import SimpleNamespace

import torch
from hyperpodrun import CheckpointManager, HPWrapper
from snippet_harness import faulty, finish

config = SimpleNamespace(steps=16)
manager = CheckpointManager()
generator, critic = faulty(torch.nn.Linear(8, 8)), torch.nn.Linear(8, 1)
generator_optimizer = torch.optim.Adam(generator.parameters(), lr=0.01)
critic_optimizer = torch.optim.Adam(critic.parameters(), lr=0.01)
manager.register(g=generator, c=critic, g_optimizer=generator_optimizer, c_optimizer=critic_optimizer)


def batch(step):
    return torch.randn(4, 8) + 1


@HPWrapper(checkpoint_manager=manager)
def run_main():
    torch.distributed.init_process_group()
    manager.restore()
    generate, judge = manager.data_parallel(generator), manager.data_parallel(critic)  # noqa: F841 - the snippet uses it
    # <snippet>


run_main()
finish()
