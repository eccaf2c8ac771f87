"""What breaks a wait: one file for each thing that the main thread can be stuck in, and `abort.py` that runs them."""
