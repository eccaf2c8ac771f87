"""What processes say to each other: typed, size-limited, epoch-stamped messages. No I/O, no torch, no pickle."""
