"""The user's own loader: which batches it has, in which order, with which random numbers, from any position on.

Knows neither files nor processes: fetchers make batches of it, and a loader without a cache does so itself.
"""
