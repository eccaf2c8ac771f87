"""Starts the host as nobody's child: whoever starts it need not wait for it, and may end before it does.

Run as `python -m hyperpodrun.dataloader.preparing.detached`, with the host's options; ends at once.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    if os.fork() == 0:
        from hyperpodrun.dataloader.preparing.host import main

        sys.exit(main(sys.argv[1:]))
    os._exit(0)
