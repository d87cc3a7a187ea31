"""``python -m desisky_tune`` is the command `desisky-tune`."""

import sys

from desisky_tune.cli import main

if __name__ == "__main__":
    sys.exit(main())
