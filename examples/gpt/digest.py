"""One line that says whether two runs ended the same: every rank's weights, optimizer state and random generators."""

import ctypes
import hashlib

import torch
import torch.distributed as dist


def digest(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """SHA-256 over what every rank ends with, the same on all ranks."""
    own = hashlib.sha256()
    generators = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]
    for tensor in [*model.state_dict().values(), *optimizer_tensors(optimizer), *generators]:
        own.update(as_bytes(tensor))
    row = torch.frombuffer(bytearray(own.digest()), dtype=torch.uint8).to(next(model.parameters()).device)
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, row)
    return hashlib.sha256(b"".join(as_bytes(row) for row in rows)).hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The optimizer's tensors, in the order of its parameters."""
    states = [optimizer.state[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    return [value for state in states for _, value in sorted(state.items()) if isinstance(value, torch.Tensor)]


def as_bytes(tensor: torch.Tensor) -> bytes:
    """The tensor's contents, whatever its type."""
    row = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return ctypes.string_at(row.data_ptr(), len(row))
