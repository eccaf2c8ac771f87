"""In the worker: the wrapped function that is re-entered after a fault, and all that makes this safe."""
