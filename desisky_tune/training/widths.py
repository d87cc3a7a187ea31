"""The widths that hidden layers are padded to (no JAX)."""

from __future__ import annotations

#: A step of twice the width moves four times the bytes; each further width is one more compile
#: for every depth and batch size.
WIDTHS = (32, 64, 128, 256, 512)


def padded_width(width: int) -> int:
    """Return the width that hidden layers of `width` units are padded to.

    The next of `WIDTHS`, above them the next multiple of the last.
    """
    for step in WIDTHS:
        if width <= step:
            return step
    return -(-width // WIDTHS[-1]) * WIDTHS[-1]
