"""`--run-path`: a worker that runs its script with runpy.run_path, as torchrun's does: the script's directory is not
put on sys.path, and what it raises is recorded in the error file."""

from __future__ import annotations

import runpy
import sys


def main() -> None:
    from torch.distributed.elastic.multiprocessing.errors import record

    sys.argv = sys.argv[1:]
    record(runpy.run_path)(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
