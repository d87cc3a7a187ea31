"""Figures: what they show, how they are saved, and that none is left behind."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from desisky_tune.data.columns import FEATURES
from desisky_tune.errors import InputError
from desisky_tune.visualization import (
    plot_broadband_band_panel,
    plot_loss_curve,
    plot_nn_outlier_analysis,
)

ROWS = 40


def first_four(x: Any) -> Any:
    """A model whose magnitudes are its first four inputs."""
    return x[:4]


def part(residuals: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
    """Inputs, targets and metadata for which `first_four` has these residuals in every band."""
    draw = np.random.default_rng(seed)
    inputs = draw.uniform(18, 21, (len(residuals), 6)).astype(np.float32)
    targets = inputs[:, :4].astype(float) - residuals[:, np.newaxis]
    meta = pd.DataFrame(draw.uniform(0.2, 1.0, (len(residuals), 6)), columns=list(FEATURES))
    return inputs, targets, meta


TRAIN_RESIDUALS = np.linspace(-0.2, 0.2, ROWS)
TEST_RESIDUALS = np.concatenate([np.linspace(-0.3, 0.3, ROWS - 3), [0.5, -0.6, 0.9]])


def outliers(**options: Any) -> Figure:
    x1, y1, m1 = part(TRAIN_RESIDUALS, 1)
    x2, y2, m2 = part(TEST_RESIDUALS, 2)
    return plot_nn_outlier_analysis(first_four, x1, y1, m1, x2, y2, m2, **options)


def band_panel(**options: Any) -> Figure:
    x1, y1, _ = part(TRAIN_RESIDUALS, 1)
    x2, y2, _ = part(TEST_RESIDUALS, 2)
    return plot_broadband_band_panel(first_four, x1, y1, x2, y2, 2, "r", **options)


def losses(**options: Any) -> Figure:
    return plot_loss_curve([0.3, 0.2, 0.1], [0.4, 0.2, 0.25], **options)


EVERY_FIGURE = pytest.mark.parametrize("draw", [losses, band_panel, outliers])


@EVERY_FIGURE
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_saves_by_suffix(draw: Callable[..., Figure], suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"figure{suffix}"
    draw(save_path=path, figsize=(6, 4))
    if suffix == ".png":
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    else:
        assert ET.parse(path).getroot().tag.endswith("svg")
    assert list(tmp_path.iterdir()) == [path]


@EVERY_FIGURE
def test_refuses_other_suffixes_before_drawing(draw: Callable[..., Figure], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"figure\.doc: a figure is saved as one of \.png, \.svg"):
        draw(save_path=tmp_path / "figure.doc")
    assert list(tmp_path.iterdir()) == []


@EVERY_FIGURE
def test_leaves_the_global_state_as_it_was(draw: Callable[..., Figure]) -> None:
    import matplotlib.pyplot as plt

    before = (dict(mpl.rcParams), plt.get_fignums())
    assert isinstance(draw(), Figure)
    assert (dict(mpl.rcParams), plt.get_fignums()) == before


def test_same_figure_gives_the_same_svg(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        losses(save_path=tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_importing_and_drawing_needs_no_pyplot() -> None:
    code = (
        "import sys; from desisky_tune.visualization import plot_loss_curve;"
        "plot_loss_curve([1.0], [1.0]); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- loss curve -----------------------------------------------------------------------------------


def test_loss_curve_shows_both_losses_and_the_best_epoch() -> None:
    (axes,) = plot_loss_curve([3.0, 2.0, 1.0], [4.0, 2.0, 2.5], title="Mine").axes
    train, test, best = axes.lines
    np.testing.assert_array_equal(train.get_xydata(), [[0, 3], [1, 2], [2, 1]])
    np.testing.assert_array_equal(test.get_xydata(), [[0, 4], [1, 2], [2, 2.5]])
    np.testing.assert_array_equal(best.get_xydata(), [[1, 2]])
    assert axes.get_title(loc="left") == "Mine"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Epoch", "Loss")
    assert "Best: 2 at epoch 1" in [text.get_text() for text in axes.get_legend().get_texts()]


def test_loss_curve_spans_epochs_without_validation() -> None:
    (axes,) = plot_loss_curve([3.0, 2.0, 1.0], [4.0, np.nan, 2.5]).axes
    np.testing.assert_array_equal(axes.lines[1].get_xydata(), [[0, 4], [2, 2.5]])


def test_loss_curve_puts_a_test_loss_of_every_third_epoch_where_it_belongs() -> None:
    (axes,) = plot_loss_curve(np.linspace(2, 1, 8), [3.0, 2.0, 2.5]).axes  # epochs 0, 3, 6
    np.testing.assert_array_equal(axes.lines[1].get_xdata(), [0, 3, 6])
    assert "Best: 2 at epoch 3" in [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize(("last", "scale"), [(0.5, "linear"), (0.01, "log"), (0.0, "linear")])
def test_loss_curve_is_logarithmic_where_that_helps(last: float, scale: str) -> None:
    (axes,) = plot_loss_curve([1.0, last], [1.0, last]).axes
    assert axes.get_yscale() == scale


def test_loss_curve_without_a_number_is_refused() -> None:
    with pytest.raises(InputError, match="no finite loss"):
        plot_loss_curve([], [np.nan])


# --- one band -------------------------------------------------------------------------------------


def histogram_total(axes: Any) -> float:
    return sum(bar.get_height() for bar in axes.patches if bar.get_width() < 0.1)


def test_band_panel_shows_every_exposure_and_the_test_rmse() -> None:
    figure = band_panel()
    predicted = [axes for axes in figure.axes if axes.get_ylabel().startswith("Predicted")]
    residual = [axes for axes in figure.axes if axes.get_ylabel() == "Exposures"]
    assert (len(predicted), len(residual)) == (2, 2)
    for axes, residuals in zip(predicted, (TRAIN_RESIDUALS, TEST_RESIDUALS), strict=True):
        points = np.concatenate([drawn.get_offsets() for drawn in axes.collections])
        np.testing.assert_allclose(points[:, 1] - points[:, 0], residuals, atol=1e-5)
    for axes in residual:
        assert histogram_total(axes) == ROWS
    rmse = np.sqrt(np.mean(TEST_RESIDUALS**2))
    guide = residual[0].get_legend().get_texts()[0].get_text()
    assert guide == f"±{rmse:.3f} mag"


def test_band_panel_names_band_and_units() -> None:
    figure = band_panel()
    labels = {axes.get_xlabel() for axes in figure.axes} | {a.get_ylabel() for a in figure.axes}
    assert r"Observed r [AB mag arcsec$^{-2}$]" in labels
    assert r"Predicted r [AB mag arcsec$^{-2}$]" in labels
    assert "Residual [mag] (prediction - observation)" in labels
    assert "r band" in figure.get_suptitle()


# --- outliers -------------------------------------------------------------------------------------


def panels(figure: Figure) -> list[Any]:
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def test_outlier_analysis_has_six_panels_with_units() -> None:
    figure = outliers(band_idx=3)
    six = panels(figure)
    assert len(six) == 6
    assert six[3].get_xlabel() == "Transparency (GFA)"
    assert six[4].get_xlabel() == r"Observed z [AB mag arcsec$^{-2}$]"
    (bar,) = [axes for axes in figure.axes if axes not in six]
    assert bar.get_ylabel() == "Moon separation [deg]"


@pytest.mark.parametrize(("limit", "beyond"), [(0.40, 3), (0.55, 2), (1.0, 0)])
def test_outlier_analysis_marks_and_counts_outliers(limit: float, beyond: int) -> None:
    six = panels(outliers(outlier_mag=limit))
    legend = [text.get_text() for text in six[3].get_legend().get_texts()]
    assert f"{beyond} of {ROWS} beyond" in legend
    ordinary, squares = six[4].collections
    assert (len(ordinary.get_offsets()), len(squares.get_offsets())) == (ROWS - beyond, beyond)
    written = " ".join(text.get_text() for text in six[5].texts)
    assert f"beyond {limit:g}: {100 * beyond / ROWS:.1f} %" in written


def test_outlier_analysis_leaves_no_exposure_outside_its_axes() -> None:
    for axes in panels(outliers()):
        for drawn in axes.collections:
            for x, y in drawn.get_offsets():
                assert axes.get_xlim()[0] <= x <= axes.get_xlim()[1]
                assert axes.get_ylim()[0] <= y <= axes.get_ylim()[1]


def test_outlier_analysis_takes_limits_and_other_metadata() -> None:
    x, y, _ = part(TEST_RESIDUALS, 3)
    water = {"PWV_los": np.linspace(1, 9, ROWS)}
    figure = plot_nn_outlier_analysis(first_four, x, y, water, x, y, water, xlim=(0.0, 10.0))
    six = panels(figure)
    assert six[3].get_xlabel() == "Precipitable water along the line of sight [mm]"
    assert six[0].get_xlim() == six[3].get_xlim() == (0.0, 10.0)
    assert len(figure.axes) == 6  # nothing to colour by, so no colour bar


def test_outlier_analysis_skips_rows_without_a_number() -> None:
    x, y, meta = part(TEST_RESIDUALS, 3)
    y[5, 0] = np.nan
    six = panels(plot_nn_outlier_analysis(first_four, x, y, meta, x, y, meta))
    assert "3 of 39 beyond" in [text.get_text() for text in six[0].get_legend().get_texts()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"band_idx": 4}, "band_idx is 4"),
        ({"outlier_mag": 0.0}, "outlier_mag is 0.0"),
        ({"meta_test": pd.DataFrame({"MOONSEP": np.ones(ROWS)})}, "TRANSPARENCY_GFA"),
        ({"meta_test": {"TRANSPARENCY_GFA": np.ones(3)}}, "3 values for 40 rows"),
        ({"y_test": np.full((ROWS, 4), np.nan)}, "test rows: none has a finite"),
        ({"y_test": np.ones((3, 4))}, "40 inputs and 3 targets"),
    ],
)
def test_what_cannot_be_drawn_is_refused(change: dict[str, Any], message: str) -> None:
    x, y, meta = part(TEST_RESIDUALS, 3)
    arguments = {
        **{"X_train": x, "y_train": y, "meta_train": meta},
        **{"X_test": x, "y_test": y, "meta_test": meta},
    }
    with pytest.raises(InputError, match=message):
        plot_nn_outlier_analysis(first_four, **{**arguments, **change})
