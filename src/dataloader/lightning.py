"""The name under which MMAPDataModule was known before it moved to `integrations/lightning`."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    from ..integrations.lightning import data

    return getattr(data, name)
