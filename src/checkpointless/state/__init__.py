"""What is carried over a fault: the registered objects, their tensors and small state, generators, and the encoding."""
