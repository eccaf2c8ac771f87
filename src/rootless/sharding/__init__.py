"""One store over many nodes, behind `shards.py`.

The side that asks: `parts` (a request cut by owners, the answers put together), `waits` (what clients wait for, asked
once for all of them), `copies` (keys of others that are read here). The side that is asked: `owner`, and in it `crowds`
(nodes that wait for the same keys). Between them `link`: batches that arrive once and in order. No I/O anywhere.
"""
