"""Batches on disk: a file of each (`format.py`), sealed if wanted (`encryption.py`), and where it lies
(`directories.py`). Written by fetchers, removed by producers, mapped by readers; knows none of them.
"""
