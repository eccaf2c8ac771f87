"""Tensors of every dtype in every layout in which torch can hold one; equal bits from equal seeds."""

from __future__ import annotations

from collections.abc import Sequence

import torch

DTYPES = [
    torch.bool,
    torch.int8,
    torch.uint8,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
LAYOUTS = ["dense", "reversed", "sliced", "stepped", "shifted", "expanded", "windows", "conjugate", "imaginary"]
"""`reversed`: dense, with the dimensions in the other order in memory. `windows`: overlaps itself, but no stride is 0.
`conjugate` and `imaginary`: what torch changes only when it is read."""


def make(dtype: torch.dtype, shape: Sequence[int], layout: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(the tensor, all memory it lies in as a row of bytes). Dimensions that the layout cannot have are its own."""
    if layout == "conjugate":
        dtype = torch.complex64
    if layout == "imaginary":
        dtype = torch.complex128
    if layout == "reversed":
        base = _random(dtype, list(reversed(shape)), seed)
        return base.permute(tuple(reversed(range(base.dim())))), base.view(-1).view(torch.uint8)
    room = {"sliced": [n + 2 for n in shape], "stepped": [2 * n for n in shape], "shifted": [n + 1 for n in shape]}
    if layout == "expanded":
        base = _random(dtype, [1 if at % 2 == 0 else n for at, n in enumerate(shape)], seed)
    elif layout == "windows":
        base = _random(dtype, [sum(shape) + 1], seed)
    else:
        base = _random(dtype, room.get(layout, list(shape)), seed)
    tensor = base
    for at, n in enumerate(shape):
        match layout:
            case "sliced":
                tensor = tensor.narrow(at, 0, n)
            case "stepped":
                tensor = tensor[(slice(None),) * at + (slice(0, None, 2),)]
            case "shifted":
                tensor = tensor.narrow(at, 1, n)
    match layout:
        case "expanded":
            tensor = base.expand(tuple(shape))
        case "windows":
            tensor = base.as_strided(list(shape), [1] * len(shape))
        case "conjugate":
            tensor = base.conj()
        case "imaginary":
            tensor = base.conj().imag
    return tensor, base.view(-1).view(torch.uint8)


def bits(tensor: torch.Tensor) -> bytes:
    """What the elements are, in row-major order."""
    plain = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return plain.view(-1).view(torch.uint8).numpy().tobytes()


def _random(dtype: torch.dtype, shape: Sequence[int], seed: int) -> torch.Tensor:
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    row = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return (row & 1 if dtype is torch.bool else row).view(dtype).view(tuple(shape))
