"""The node-local store: the TCPStore protocol of torch, served to the node's own workers on loopback.

Owns the keys through which the workers of an epoch find each other. It must never import torch, block the
agent's event loop, or let one epoch see another's keys. The agent runs a `StoreServer`; workers use torch's
own C++ client.
"""
