"""The node: its endpoints, its GPUs, and the connection of its events and commands with the job's decisions."""
