"""A script of `launch.py`: imports torch, says so, and waits until its memory has been measured."""

import os
import sys
import time
from pathlib import Path

import torch

assert torch.__version__
directory = Path(sys.argv[1])
(directory / f"idle.{os.getpid()}").touch()
while not (directory / "measured").exists():
    time.sleep(0.02)
