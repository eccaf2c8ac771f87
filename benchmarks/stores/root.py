"""torch's TCPStore server in a process of its own, which every rank dials: `root.py SOCKET`."""

from __future__ import annotations

import sys
from typing import Any

from meeting import come, raise_limits, spent_s, transferred


def main() -> None:
    raise_limits()
    import torch.distributed as dist

    desk = come(sys.argv[1], "root")
    stores: list[Any] = []
    while True:
        try:
            name, *_ = desk.recv()
        except EOFError:
            return
        if name == "new":  # as torchrun has another for every restart
            stores[:] = [dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)]
            desk.send(stores[0].port)
        else:
            desk.send((0, transferred(), spent_s()))


if __name__ == "__main__":
    main()
