"""``python -m desisky_tune`` is the command `desisky-tune`."""

from desisky_tune.cli import program

if __name__ == "__main__":
    program()
