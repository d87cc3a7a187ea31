"""Small figures for a page: one idea each, legible at the width of a phone.

A panel is drawn on white and saved as PNG and SVG; `inline_svg` turns the SVG into a piece
of an HTML page whose colours follow the page's, light or dark.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from desisky_tune.data.columns import BANDS
from desisky_tune.visualization.style import BAND_COLOURS, GUIDE, OUTLIER, TRAIN, new_figure

#: Width of a panel (inches): with 9 pt text it stays legible on a screen of 390 px.
WIDTH = 4.4

INK = OUTLIER
_AXIS = "#444444"
_GRID = "#e6e6e6"

#: Colours of a panel, and the page's variables that replace them.
VARIABLES: dict[str, str] = {
    "#ffffff": "var(--paper)",
    INK: "var(--ink)",
    _AXIS: "var(--axis)",
    _GRID: "var(--grid)",
    GUIDE: "var(--guide)",
    TRAIN: "var(--train)",
    **{BAND_COLOURS[band]: f"var(--band-{band})" for band in BANDS},
}

#: Points beyond which a cloud is drawn as pixels: a path for each would make the page heavy.
MOST_POINTS = 1500

_IDENTIFIER = re.compile(r'(\bid="|href="#|url\(#)')
_HEX = re.compile("|".join(VARIABLES), re.IGNORECASE)


@contextmanager
def panel(height: float = 3.3, width: float = WIDTH) -> Iterator[Figure]:
    """Yield a figure of a panel's width; heights in inches."""
    style: Any = {
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "xtick.color": _AXIS,
        "ytick.color": _AXIS,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "lines.linewidth": 1.3,
    }
    with new_figure((width, height)) as figure, mpl.rc_context(style):
        figure.set_layout_engine("constrained", w_pad=0.04, h_pad=0.05)
        yield figure


def rasterized(rows: int) -> bool:
    """Tell whether a cloud of so many points is drawn as pixels."""
    return rows > MOST_POINTS


def save_panel(figure: Figure, folder: Path, name: str) -> str:
    """Write ``<name>.png`` and ``<name>.svg``; return the SVG as `inline_svg` gives it."""
    from desisky_tune.visualization.style import save_figure

    # Letters stay letters: small files, and text that can be searched and selected.
    with mpl.rc_context({"svg.fonttype": "none"}):
        save_figure(figure, folder / f"{name}.png")
        # Laid out once: finding the places takes longer than drawing.
        figure.set_layout_engine("none")
        save_figure(figure, folder / f"{name}.svg")
    return inline_svg((folder / f"{name}.svg").read_text(encoding="utf-8"), name)


def inline_svg(svg: str, name: str) -> str:
    """Return matplotlib's SVG as an element of a page.

    Identifiers get the panel's name in front, so that no two on the page are the same;
    colours become the page's variables; the page's font is used.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\swidth="[\d.]+pt"|\sheight="[\d.]+pt"', "", body, count=2)
    body = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", body).replace("xlink:href", "href")
    body = _IDENTIFIER.sub(lambda match: f"{match[0]}{name}-", body)
    # A colour stands in a style; what follows '#' in a reference is an identifier.
    body = re.sub(r'style="[^"]*"', lambda match: _in_style(match[0]), body)
    return body.strip()


def _in_style(style: str) -> str:
    coloured = _HEX.sub(lambda match: VARIABLES[match[0].lower()], style)
    return coloured.replace("'DejaVu Sans'", "system-ui, sans-serif")
