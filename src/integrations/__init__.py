"""Recovery in the frameworks that people train with, a folder or file for each; imported by who uses it."""
