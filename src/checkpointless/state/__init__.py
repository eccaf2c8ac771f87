"""What is carried over a fault: the registered objects, their tensors, small state and generators."""
