"""Tests that need a GPU. Several NCCL ranks share it where there is only one."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks on the first GPU, however many there are."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0])


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    """Skips everything here on a machine without one."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU and a torch built for CUDA (scripts/gpu-check runs these on such a machine)")
