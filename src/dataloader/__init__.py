"""In the worker and beside it: batches that are prepared ahead, in memory-mapped files that outlive the worker.

What a script uses is here: `loader.py`, `config.py`, `errors.py`, `lightning.py`. Behind it are four rooms
(docs/dataloader.md has the whole picture):

- `preparing/`: the **host**, one process per node and job, forks a **producer** per stream, which has batches made
  ahead of the readers by its **fetchers** and removes them behind;
- `sources/`: what a fetcher makes them of, the user's own loader, entered at any position, and its random numbers;
- `storing/`: what a batch's file looks like, and which directories it lies in;
- `reading/`: the **reader**, in the training process, which maps the next file.

Both sides know the stream's name (`names.py`), the user's factory (`recipe.py`) and how packets travel (`wire.py`);
what is in them is `protocol/dataloader.py`. Reading knows of preparing only how the host is started.
"""
