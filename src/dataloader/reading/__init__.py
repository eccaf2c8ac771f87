"""The reader's side, in the training process: one epoch of batches (`batches.py`), where it stands (`cursor.py`), the
conversation with the producer (`connection.py`) about data that `fingerprints.py` tells from other data, batches from
other ranks (`warming.py` decides, `peers.py` carries), and the same order without a cache (`passthrough.py`).
"""
