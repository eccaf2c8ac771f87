"""A job on many nodes in virtual time: real agents' decisions, a network and workers made of events. Seeded, no I/O."""
