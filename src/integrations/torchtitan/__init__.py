"""torchtitan's trainer, made recoverable: its own loop, with its containers, its data, its metrics and checkpoints.

    recoverable(main)()     in a script that calls a `main` that builds a Trainer and trains it
    hyperpodrun --inprocess-restart -m hyperpodrun.integrations.torchtitan --module llama3 --config llama3_debugmodel
                            instead of -m torchtitan.train

`trainer` follows the loop, `state` says what is carried, `metrics` keeps the loggers.
"""

from __future__ import annotations

from .trainer import recoverable

__all__ = ["recoverable"]
