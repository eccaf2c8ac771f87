"""The processes of a node: workers, the source they are forked from, the host of their data producers."""
