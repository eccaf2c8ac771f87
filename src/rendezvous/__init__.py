"""How agents find each other and talk: ZeroMQ on the node's address in the port range. No torch, no decisions."""
