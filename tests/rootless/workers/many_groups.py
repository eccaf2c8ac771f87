"""Hundreds of groups in one epoch: tensor, pipeline and data parallel by a mesh, and groups of two to all ranks.

    many_groups.py COUNT FAULT     `middle`: a fault strikes rank 1 in the first epoch, after half of its groups

torch names a group by how many there were before, so every rank goes through all of them in one order. A rank comes to
the store only for those that it is of: no two ask for the same keys in the same order, and some are far ahead. At the
end each adds up the ranks in all of its groups.
"""

import random
import sys

import torch
import torch.distributed as dist
from hyperpodrun import HPCallWrapper, HPWrapper
from torch.distributed.device_mesh import init_device_mesh

COUNT, FAULT = int(sys.argv[1]), sys.argv[2]


def members_of(number: int, world_size: int) -> list[int]:
    dice = random.Random(number)
    return sorted(dice.sample(range(world_size), dice.choice((2, 2, 2, 3, 4, world_size))))


def add_up(group: dist.ProcessGroup, members: list[int]) -> None:
    total = torch.tensor([dist.get_rank()])
    dist.all_reduce(total, group=group)
    assert total.item() == sum(members), (total, members)


@HPWrapper()
def train(caller: HPCallWrapper | None = None) -> None:
    assert caller is not None
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, 2, world_size // 4), mesh_dim_names=("pp", "dp", "tp"))
    for name in ("pp", "dp", "tp"):
        group = mesh[name].get_group()
        add_up(group, dist.get_process_group_ranks(group))
    wanted = {number: members_of(number, world_size) for number in range(COUNT)}
    made = {}
    for number, members in wanted.items():
        if FAULT == "middle" and caller.epoch == 0 and rank == 1 and number == COUNT // 2:
            raise ValueError("in the middle of its groups")
        group = dist.new_group(members)
        if rank in members:
            made[number] = group
    for number, group in made.items():
        add_up(group, wanted[number])
    sys.stdout.write(f"epoch {caller.epoch}: rank {rank} of {world_size} is in {len(made)} groups\n")


train()
