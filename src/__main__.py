"""`python -m hyperpodrun`: the same as the `hyperpodrun` command."""

from .launcher import command

if __name__ == "__main__":
    command()
