"""How: state on its way to who has lost it, from a peer's memory, a snapshot, or disk."""
