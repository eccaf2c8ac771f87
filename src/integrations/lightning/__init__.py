"""Lightning's trainer under hyperpodrun.

- `data`: `MMAPDataModule`, a data module whose batches are cached.
"""
