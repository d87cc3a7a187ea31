"""``python -m desisky_tune.cli.parcel RUN``: what `fetch` runs on a cluster.

Not a command of its own: it writes a run's results into the log of the job that it is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from desisky_tune.cli.console import one_line, say
from desisky_tune.errors import DesiskyTuneError
from desisky_tune.jobs.parcel import pack


def main(argv: Sequence[str]) -> int:
    """Print the parcel of the run at ``argv[0]``; return an exit code."""
    try:
        for line in pack(argv[0]):
            print(line)
    except DesiskyTuneError as error:
        say(f"desisky-tune: error: {one_line(error)}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
