"""One store over many nodes, behind `shards.py`. No I/O anywhere.

The side that asks: `places` and `parts` (where a request's keys belong, what each owner is asked, how answers become
one), `asks` (what is under way), `waits` (clients that wait, together), `copies` (keys of others that are read here),
`epoch` (who owns what). The side that is asked: `owner`, and in it `crowds` (nodes that wait for the same). Between
nodes: `exchange` (who hears what), `link` (batches that arrive once and in order), `relays` (answers passed on).
"""
