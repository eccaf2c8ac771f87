"""Loops written with Hugging Face accelerate, recovered bit for bit.

    from hyperpodrun.integrations.accelerate import epochs, recoverable    # 1

    @recoverable                                                           # 2
    def main():
        accelerator = Accelerator()
        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
        for epoch in epochs(loader, 3):                                    # 3: instead of range(3)
            for batch in loader:
                ...

- `recoverable`: makes a function one that is entered again after a fault (`entry.py`).
- `epochs`: the loop over a loader, which goes on with the interrupted batch (`loop.py`).
- `recovery.Recovery`: what both share with the Trainer of `integrations.hf`: registering, restoring, and the agreement
  of all ranks on what lay between two steps. `place.Place` is where a loop was.
- `config`: what the file of `accelerate config` means here.
- `teaching`: the classes of accelerate that ask for a recovery, if there is one.

Importing this imports no accelerate.
"""

from __future__ import annotations

from .entry import recoverable
from .loop import epochs

__all__ = ["epochs", "recoverable"]
