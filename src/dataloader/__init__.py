"""In the worker and beside it: batches that are prepared ahead, in memory-mapped files that outlive the worker.

Who is who, from the training loop outwards (docs/dataloader.md has the whole picture):

- the **reader** (`loader.py`) maps the next batch's file and hands out tensors that lie in it;
- the **producer** (`producer.py`, which `opening.py` makes) is one process per node and data stream: it knows the order
  of batches, has them made ahead of the readers (`readers.py`) and removes them behind;
- its **fetchers** (`fetcher.py`; `fetchers.py` is its side) run the user's dataset and write the files;
- the **host** (`host.py`) is one process per node and job, started by the agent: it forks the producers.
"""
