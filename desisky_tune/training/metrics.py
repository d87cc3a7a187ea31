"""How good predictions are, in magnitudes (NumPy; no JAX)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from desisky_tune.data.columns import BANDS

#: A prediction this far off (mag) is an outlier.
OUTLIER_MAG = 0.40

#: Standard deviation over median absolute deviation of a normal distribution, 1 / Phi^-1(3/4).
NMAD_SCALE = 1.482602218505602


def band_rmse(pred: ArrayLike, target: ArrayLike) -> NDArray[np.float64]:
    """Root of the mean squared residual of each band over all rows.

    Parameters
    ----------
    pred, target
        Magnitudes, shape ``(n, bands)``.

    Returns
    -------
    ndarray
        Shape ``(bands,)``, mag; NaN when there is no row.
    """
    residual = _residual(pred, target)
    if not len(residual):
        return np.full(residual.shape[1], np.nan)
    return np.sqrt(np.mean(residual**2, axis=0))


def objective(pred: ArrayLike, target: ArrayLike) -> float:
    """Return what a search minimises: the mean of the bands' RMSE, mag."""
    return float(np.mean(band_rmse(pred, target)))


def band_metrics(pred: ArrayLike, target: ArrayLike) -> dict[str, dict[str, float | int]]:
    """Describe the residuals (prediction - observation) of each band.

    Parameters
    ----------
    pred, target
        Magnitudes, shape ``(n, 4)``, in the order V, g, r, z.

    Returns
    -------
    dict
        By band: `rmse`; `bias`, the mean residual; `nmad`, 1.4826 times the median absolute
        deviation from the median residual; `outlier_fraction`, the share of rows with a
        residual beyond 0.4 mag; `n`, the number of rows. Without rows the figures are NaN.
    """
    residual = _residual(pred, target)
    if residual.shape[1] != len(BANDS):
        raise ValueError(f"{residual.shape[1]} bands given; there are {len(BANDS)}: {BANDS}")
    rmse = band_rmse(pred, target)
    return {
        band: {"rmse": float(rmse[column]), **_describe(residual[:, column])}
        for column, band in enumerate(BANDS)
    }


def _describe(residual: NDArray[np.float64]) -> dict[str, float | int]:
    if not len(residual):
        return {"bias": np.nan, "nmad": np.nan, "outlier_fraction": np.nan, "n": 0}
    deviation = np.abs(residual - np.median(residual))
    return {
        "bias": float(residual.mean()),
        "nmad": float(NMAD_SCALE * np.median(deviation)),
        "outlier_fraction": float(np.mean(np.abs(residual) > OUTLIER_MAG)),
        "n": len(residual),
    }


def _residual(pred: Any, target: Any) -> NDArray[np.float64]:
    pred, target = np.asarray(pred, np.float64), np.asarray(target, np.float64)
    if pred.shape != target.shape or pred.ndim != 2:
        raise ValueError(
            f"predictions of shape {pred.shape} and targets of shape {target.shape}: both must"
            " be (rows, bands)"
        )
    return pred - target
