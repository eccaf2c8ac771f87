"""Breaking a job on purpose, and seeing what that changed.

- `grammar`: what a fault is called (`kill:rank=1,step=20,where=backward`), and which of several is due when.
- `faults`: how a process breaks.
- `settings`: the environment variables that ask for it, and who may set them.
- `injector`: where in a step the faults fire; hooks on what is registered.
- `trace`: a digest of everything that is registered, after each pass.
- `result`: what a script declares to be its outcome.

Nothing here runs unless the environment asks for it. Importing the package imports no torch.
"""

from __future__ import annotations

from .faults import fire
from .grammar import KINDS, PLACES, Injection, numbered, parse_injections
from .outcome import result

__all__ = ["KINDS", "PLACES", "Injection", "fire", "numbered", "parse_injections", "result"]
