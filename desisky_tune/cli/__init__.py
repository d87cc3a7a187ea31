"""The command `desisky-tune`: a thin layer over the library, and the only one that prints.

Results go to standard output, everything else to standard error. Ray, JAX, astropy and
pandas are imported inside the commands that need them, so that ``--help`` is quick.
"""

from __future__ import annotations

from desisky_tune.cli.entry import main, program

__all__ = ["main", "program"]
