"""hyperpodrun: run training jobs that are too expensive to lose.

The public names are imported on first use, so that importing the package costs nothing and never pulls torch into
the launcher or the agent.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "HPWrapper": ".inprocess.wrapper",
    "HPCallWrapper": ".inprocess.call",
    "HPAgentK8sAPIFactory": ".inprocess.connection",
    "HealthCheck": ".inprocess.health",
    "HealthCheckError": ".inprocess.health",
    "CheckpointManager": ".checkpointless.manager",
    "RestoreError": ".checkpointless.errors",
    "StateProvider": ".checkpointless.state.provider",
    "UnsupportedStateError": ".checkpointless.errors",
    "CudaHealthCheck": ".inprocess.health",
    "ParameterUpdateLock": ".inprocess.update_lock",
    "RestorePlan": ".protocol.plan",
    "CacheResumeMMAPConfig": ".dataloader.config",
    "MMAPDataLoader": ".dataloader.loader",
    "MMAPDataModule": ".integrations.lightning.data",
    "PassthroughMMAPConfig": ".dataloader.config",
}

if TYPE_CHECKING:
    from .checkpointless.errors import RestoreError, UnsupportedStateError
    from .checkpointless.manager import CheckpointManager
    from .checkpointless.state.provider import StateProvider
    from .dataloader.config import CacheResumeMMAPConfig, PassthroughMMAPConfig
    from .dataloader.loader import MMAPDataLoader
    from .inprocess.call import HPCallWrapper
    from .inprocess.connection import HPAgentK8sAPIFactory
    from .inprocess.health import CudaHealthCheck, HealthCheck, HealthCheckError
    from .inprocess.update_lock import ParameterUpdateLock
    from .inprocess.wrapper import HPWrapper
    from .integrations.lightning.data import MMAPDataModule
    from .protocol.plan import RestorePlan

__all__ = [
    "CacheResumeMMAPConfig",
    "CheckpointManager",
    "CudaHealthCheck",
    "HPAgentK8sAPIFactory",
    "HPCallWrapper",
    "HPWrapper",
    "HealthCheck",
    "HealthCheckError",
    "MMAPDataLoader",
    "MMAPDataModule",
    "ParameterUpdateLock",
    "PassthroughMMAPConfig",
    "RestoreError",
    "RestorePlan",
    "StateProvider",
    "UnsupportedStateError",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
