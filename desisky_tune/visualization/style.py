"""How every figure looks, and how it is saved.

Figures are plain `matplotlib.figure.Figure` objects: nothing is registered with pyplot, so none
leaks, and no display is needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from desisky_tune.data.columns import BANDS
from desisky_tune.errors import InputError
from desisky_tune.files import atomic_path

#: Colours that stay apart for colour-blind readers (after Okabe & Ito).
TRAIN = "#56708a"
TEST = "#d55e00"
OUTLIER = "#111111"
GUIDE = "#8a8a8a"
BAND_COLOURS = dict(zip(BANDS, ("#009e73", "#0072b2", "#d55e00", "#882255"), strict=True))

#: What a figure may be saved as.
SUFFIXES = (".png", ".svg", ".pdf")

#: Units by column, as axes show them.
UNITS = {
    "MOONSEP": "deg",
    "MOONALT": "deg",
    "OBSALT": "deg",
    "SUNALT": "deg",
    "SUNSEP": "deg",
    "PWV_los": "mm",
}
NAMES = {
    "MOONSEP": "Moon separation",
    "MOONALT": "Moon altitude",
    "OBSALT": "Pointing altitude",
    "SUNALT": "Sun altitude",
    "SUNSEP": "Sun separation",
    "MOONFRAC": "Illuminated fraction of the Moon",
    "TRANSPARENCY_GFA": "Transparency (GFA)",
    "ECLIPSE_FRAC": "Fraction of the Moon in the umbra",
    "PWV_los": "Precipitable water along the line of sight",
}
MAGNITUDE_UNIT = r"AB mag arcsec$^{-2}$"


@contextmanager
def new_figure(figsize: tuple[float, float]) -> Iterator[Figure]:
    """Yield a figure in the house style; draw on it inside the block."""
    size = min(max(0.7 * figsize[0], 9.0), 16.0)
    style: Any = {  # the stubs want each key as a literal
        "font.size": size,
        "axes.titlesize": size * 1.05,
        "axes.labelsize": size,
        "figure.titlesize": size * 1.25,
        "legend.fontsize": size * 0.85,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#444444",
        "axes.linewidth": 0.8,
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        "grid.linewidth": 0.7,
        "axes.axisbelow": True,
        "axes.titlelocation": "left",
        "xtick.direction": "out",
        "ytick.direction": "out",
        "lines.linewidth": 1.6,
    }
    with mpl.rc_context(style):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
        yield Figure(figsize=figsize, layout=layout, facecolor="white")


def label(column: str) -> str:
    """Return what an axis calls a column, with its unit where it has one."""
    name = NAMES.get(column, column)
    return f"{name} [{UNITS[column]}]" if column in UNITS else name


def check_save_path(path: str | os.PathLike[str] | None) -> None:
    """Refuse a figure's name before it is drawn.

    Raises
    ------
    InputError
        When the suffix is none that a figure is saved as.
    """
    if path is not None and Path(path).suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: a figure is saved as one of {', '.join(SUFFIXES)}")


def save_figure(figure: Figure, path: str | os.PathLike[str] | None) -> None:
    """Write a figure in the format that the suffix names; `None` writes nothing.

    The same figure gives the same SVG: it carries no date and no random identifiers.

    Raises
    ------
    InputError
        When the suffix is none that a figure is saved as.
    StorageError
        When the file cannot be written.
    """
    if path is None:
        return
    check_save_path(path)
    target = Path(path).expanduser()
    with mpl.rc_context({"svg.hashsalt": "desisky_tune"}), atomic_path(target) as temporary:
        _write(figure, temporary, target.suffix.lower())


def _write(figure: Figure, path: Path, suffix: str) -> None:
    """Draw a figure once; `Figure.savefig` draws one with a layout twice."""
    dpi = figure.dpi
    figure.set_dpi(150)
    try:
        if suffix == ".png":
            FigureCanvasAgg(figure).print_png(path)
        elif suffix == ".svg":
            FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})
        else:
            FigureCanvasPdf(figure).print_pdf(path)
    finally:
        figure.set_dpi(dpi)
