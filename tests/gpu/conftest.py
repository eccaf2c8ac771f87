"""Tests that need a GPU. Several NCCL ranks share it where there is only one."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    """Skips everything here on a machine without one."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU and a torch built for CUDA (scripts/gpu-check runs these on such a machine)")
