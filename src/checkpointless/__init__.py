"""In the worker: what training must carry over a fault, where it is kept, and how it gets to who has lost it."""
