"""torchtitan 0.3 takes for granted that there is a GPU; this lets it train on the CPU, with gloo. Import it first."""

import os
from types import SimpleNamespace

import torch
import torch._utils
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import FSDPModule

NEEDED = not torch.accelerator.is_available()

if not hasattr(torch.distributed, "set_timeout"):  # newer than 2.13
    torch.distributed.set_timeout = distributed_c10d._set_pg_timeout

if NEEDED:
    torch._utils._get_available_device_type = lambda: "cpu"  # asked once, when torchtitan is imported: "cuda" if None

    from torchtitan.tools import utils

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lacking = {
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "cpu",
        "get_device_properties": lambda *_: SimpleNamespace(total_memory=memory),
        "reset_peak_memory_stats": lambda: None,
        "empty_cache": lambda: None,
        "memory_stats": lambda *_: {},
    }
    utils.device_module = SimpleNamespace(**{**vars(torch.cpu), **lacking})


def prepare(config):
    """The same config, so that it trains there."""
    if not NEEDED:
        return config
    from torchtitan.models.common.attention import ScaledDotProductAttention

    config.training.disable_cuda_graphs = True
    config.parallelism.spmd_backend = "partial_dtensor"  # the default needs a newer torch than 2.13
    for layer in config.model_spec.model.layers:  # FlexAttention has no backward pass on the CPU
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    parallelize = config.model_spec.parallelize_fn

    def only_sums(*args, **kwargs):
        """gloo multiplies nothing on the way."""
        model = parallelize(*args, **kwargs)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
        return model

    config.model_spec.parallelize_fn = only_sums
    return config
