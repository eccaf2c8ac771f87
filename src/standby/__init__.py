"""The standby source: a process that has imported torch and forks workers from itself.

Owns: everything that runs in the source, and in a worker before its script. `hook/sitecustomize.py` is how it gets in.
It imports and forks; it never runs an operation, touches a GPU or starts a thread.
"""
