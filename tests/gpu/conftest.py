"""Tests that need a GPU, and are left out without one. Several NCCL ranks share it where there is only one."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks on the first GPU, however many there are."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0])
