"""torchtitan's own entry point, `torchtitan.train`, with the same arguments."""

from __future__ import annotations

from .trainer import recoverable, torchtitan

if __name__ == "__main__":
    recoverable(torchtitan("torchtitan.train").main)()
