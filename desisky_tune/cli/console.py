"""Plain text for a terminal: lines, aligned tables, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

#: What stands in a table for a value that is not there.
ABSENT = "-"


def say(text: str) -> None:
    """Print a message to standard error."""
    print(printable(text), file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print a result to standard output."""
    print(printable(text))


def show_json(content: Any) -> None:
    """Print a result as JSON, NaN and infinities as null."""
    print(json.dumps(_plain(content), indent=2, allow_nan=False))


def one_line(message: object) -> str:
    """Return a message as one line: its own lines joined by semicolons."""
    lines = (" ".join(line.split()) for line in str(message).splitlines())
    return "; ".join(line for line in lines if line)


def printable(text: str) -> str:
    """Return `text` with control characters other than line breaks shown as escapes.

    A file's name or a table's column may hold some, and a terminal would obey them.
    """
    if all(c == "\n" or c.isprintable() for c in text):
        return text
    return "".join(
        c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]], *, left: int = 1) -> str:
    """Return rows as aligned columns: the first `left` to the left, the others to the right."""
    lines = [[str(cell) for cell in line] for line in (headings, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def number(value: Any, form: str = ".4f") -> str:
    """Return a number in a given form; `ABSENT` for None and NaN."""
    if value is None or value != value:
        return ABSENT
    return format(value, form)


def duration(seconds: float) -> str:
    """Return a time as a person says it: '8 s', '3 min 20 s', '2 h 5 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def configuration_text(configuration: Mapping[str, Any]) -> str:
    """Return hyperparameters in one short line."""
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in configuration.items()
    )


def _plain(content: Any) -> Any:
    """Return `content` with Python's own types, so that JSON can hold it."""
    if isinstance(content, Mapping):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    if hasattr(content, "tolist"):
        return _plain(content.tolist())
    if isinstance(content, float):
        return content if content - content == 0 else None
    if content is None or isinstance(content, str | int):
        return content
    return str(content)
