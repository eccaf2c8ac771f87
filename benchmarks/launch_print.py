"""A script of `launch.py`: only prints. It does not import torch."""

import os

print(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} is here", flush=True)
