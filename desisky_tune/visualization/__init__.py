"""Figures of training and of a model's errors. matplotlib is imported when one is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from desisky_tune.visualization.curves import plot_loss_curve
    from desisky_tune.visualization.diagnostics import (
        plot_broadband_band_panel,
        plot_nn_outlier_analysis,
    )

__all__ = ["plot_broadband_band_panel", "plot_loss_curve", "plot_nn_outlier_analysis"]


def __getattr__(name: str) -> Any:
    if name == "plot_loss_curve":
        from desisky_tune.visualization import curves

        return curves.plot_loss_curve
    if name in ("plot_broadband_band_panel", "plot_nn_outlier_analysis"):
        from desisky_tune.visualization import diagnostics

        return getattr(diagnostics, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
