"""The user's own loader: which batches it has, in which order, with which random numbers, from any position on.

`map_style.py` is for loaders whose batches can be made from their indices (`indices.py`), `iterable.py` for all others;
both ask `loaders.py` and draw by `seeds.py`. Knows neither files nor processes: fetchers make batches of it, and a
loader without a cache does so itself.
"""
