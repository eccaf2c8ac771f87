"""The producer's side: processes that make batches ahead of the readers and remove them behind.

`__main__.py` is the start of the host, by the agent or, without one, by `standalone.py`; `host.py` forks producers. A
producer begins in `opening.py`, runs in `producer.py`, decides in `window.py`, hears its readers (`readers.py`) and has
a pool of fetchers (`fetcher_pool.py`), each of which is a `fetcher.py`. Nothing here knows of `reading/`.
"""
