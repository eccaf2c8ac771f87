"""`python -m hyperpodrun`: the same as the `hyperpodrun` command."""

from .launcher import entry_point

if __name__ == "__main__":
    entry_point()
