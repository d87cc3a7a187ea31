"""The training core in C: one MLP on one core of a CPU, several times as fast as XLA's.

``training.c`` trains, `library` compiles it for this machine, `weights` knows its layout,
`program` has the face of `desisky_tune.training.program.Program`.
"""

from __future__ import annotations

from desisky_tune.training.native.library import library, make_ready, missing_because

__all__ = ["library", "make_ready", "missing_because"]
