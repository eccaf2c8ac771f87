"""The job as one value: epochs, ranks, faults, restarts, who gives state to whom. No I/O at all."""
