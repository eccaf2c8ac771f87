"""What processes say to each other: typed, size-limited, epoch-stamped messages, and in `values/` what else is to be
carried or kept, plain values as bytes. No I/O, no pickle, and no torch unless a value is of it."""
