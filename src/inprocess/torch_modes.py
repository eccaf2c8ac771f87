"""torch's modes of the main thread: a wrapped function finds them at every entry as it found them at the first.

An interrupt can come between the line of a context manager's `__enter__` that sets a mode and the `with` block that
would unset it. Gradients that stay switched off fail at once; a cache of autocast that is never cleared, because the
nesting is counted one too high, would go on with the weights of an earlier step.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class TorchModes:
    """`TorchModes.now()` reads them, `restore` sets them."""

    grad_enabled: bool
    autocast: dict[str, tuple[bool, Any]]
    """By device type: whether it is on, and its dtype."""
    autocast_cache: bool
    autocast_nesting: int

    @classmethod
    def now(cls) -> TorchModes | None:
        """None where torch is not imported: then nothing is set."""
        torch = sys.modules.get("torch")
        if torch is None:
            return None
        torch.autocast_increment_nesting()
        return cls(
            torch.is_grad_enabled(),
            {device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _DEVICES},
            torch.is_autocast_cache_enabled(),
            torch.autocast_decrement_nesting(),
        )

    def restore(self) -> None:
        """Also makes the default stream the current one, where CUDA is in use."""
        torch = sys.modules["torch"]
        torch.set_grad_enabled(self.grad_enabled)
        for device, (enabled, dtype) in self.autocast.items():
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(self.autocast_cache)
        nesting = torch.autocast_increment_nesting()
        while nesting > self.autocast_nesting:
            nesting = torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        if torch.cuda.is_initialized():
            torch.cuda.set_stream(torch.cuda.default_stream())
