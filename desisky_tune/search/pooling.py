"""The objective of a trial that is trained on several folds, with several seeds.

For each seed the squared errors of the folds are pooled epoch by epoch, per band over all
rows; then the root, then the mean of the bands. The best epoch is that of this curve: an
epoch that each fold chose for itself would flatter the configuration. The lowest values of
the seeds are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from desisky_tune.data.columns import BANDS
from desisky_tune.search.backend import CURVE_SERIES, Member, Progress

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class MemberCurve:
    """What one member of a trial measured, epoch by epoch.

    Attributes
    ----------
    member
        Fold and seed.
    rows
        Validation rows of the fold: its weight in the pool.
    curve
        By name of series (`CURVE_SERIES`): losses, and RMSE by band (mag).
    objectives
        Mean of the bands' RMSE (mag).
    """

    member: Member
    rows: int
    curve: Mapping[str, Sequence[float]]
    objectives: Sequence[float]


@dataclass(frozen=True)
class Pooled:
    """Curves of several members as one.

    Attributes
    ----------
    epochs
        Epochs that every member has.
    objective
        Mean over the seeds of the lowest pooled RMSE (mag).
    best_epochs
        By seed: the epoch, counted from 0, of its lowest pooled RMSE.
    rmse
        By band (mag), at each seed's best epoch, averaged over the seeds.
    train_loss, test_loss
        Likewise.
    spread
        Standard deviation of the seeds' lowest values (mag); None with one seed.
    curve
        By name of series: RMSE and test loss over all folds' rows, train loss averaged
        over the folds; all averaged over the seeds.
    objectives
        With one seed its pooled RMSE epoch by epoch (mag), with several the mean of their
        lowest so far, so that the lowest up to an epoch is the objective there.
    """

    epochs: int
    objective: float
    best_epochs: Mapping[int, int]
    rmse: Mapping[str, float]
    train_loss: float
    test_loss: float
    spread: float | None
    curve: Mapping[str, list[float]]
    objectives: list[float]

    @property
    def best_epoch(self) -> int:
        """The lower median of the seeds' best epochs."""
        return sorted(self.best_epochs.values())[(len(self.best_epochs) - 1) // 2]


def pool(members: Sequence[MemberCurve]) -> Pooled:
    """Pool the curves of a trial's members.

    Parameters
    ----------
    members
        Every seed with the same folds; curves may differ in length, the shortest counts.
        Its values must be finite, and there must be at least one epoch.

    Returns
    -------
    Pooled
        With one member, its own figures bit for bit.
    """
    epochs = min(len(each.objectives) for each in members)
    by_seed: dict[int, list[MemberCurve]] = {}
    for each in members:
        by_seed.setdefault(each.member.seed, []).append(each)
    seeds = {seed: _pool_folds(folds, epochs) for seed, folds in by_seed.items()}
    best = {seed: int(np.argmin(objectives)) for seed, (_, objectives) in seeds.items()}
    at_best = np.array([series[:, best[seed]] for seed, (series, _) in seeds.items()])
    lowest = [float(objectives[best[seed]]) for seed, (_, objectives) in seeds.items()]
    train_loss, test_loss, *rmse = map(float, _mean(at_best))
    curves = _mean(np.array([series for series, _ in seeds.values()]))
    told = [objectives for _, objectives in seeds.values()]
    if len(told) > 1:
        told = [np.minimum.accumulate(objectives) for objectives in told]
    return Pooled(
        epochs=epochs,
        objective=float(_mean(np.array(lowest))),
        best_epochs=best,
        rmse=dict(zip(BANDS, rmse, strict=True)),
        train_loss=train_loss,
        test_loss=test_loss,
        spread=float(np.std(lowest, ddof=1)) if len(lowest) > 1 else None,
        curve={name: values.tolist() for name, values in zip(CURVE_SERIES, curves, strict=True)},
        objectives=_mean(np.array(told)).tolist(),
    )


def pooled_progress(
    members: Sequence[MemberCurve],
    seconds: float,
    reason: str | None = None,
    *,
    patience: int = 0,
) -> Progress:
    """Say where a trial stands.

    Parameters
    ----------
    members
        As for `pool`; with a reason their last values need not be finite.
    seconds
        Time spent training the trial.
    reason
        Why it cannot go on; None while all is well.
    patience
        Epochs without a better value, by every seed's pooled curve, after which the trial has
        ended; 0 for any number.
    """
    if reason is not None:
        return _failed(members, seconds, reason)
    pooled = pool(members)
    return Progress(
        epochs=pooled.epochs,
        objective=pooled.objective,
        best_epoch=pooled.best_epoch,
        rmse=pooled.rmse,
        train_loss=pooled.train_loss,
        test_loss=pooled.test_loss,
        seconds=seconds,
        curve=pooled.curve,
        objectives=pooled.objectives,
        spread=pooled.spread,
        stopped=patience > 0
        and all(pooled.epochs > best + patience for best in pooled.best_epochs.values()),
    )


def _pool_folds(folds: Sequence[MemberCurve], epochs: int) -> tuple[Floats, Floats]:
    """Return the series ``(len(CURVE_SERIES), epochs)`` and the objective of one seed."""
    series = np.array([[each.curve[name][:epochs] for name in CURVE_SERIES] for each in folds])
    if len(folds) == 1:
        return series[0], np.asarray(folds[0].objectives[:epochs], dtype=float)
    weights = np.array([each.rows for each in folds], dtype=float)
    weights /= weights.sum()
    train_loss = series[:, :1].mean(axis=0)
    test_loss = np.tensordot(weights, series[:, 1:2], axes=1)
    rmse = np.sqrt(np.tensordot(weights, series[:, 2:] ** 2, axes=1))
    return np.concatenate([train_loss, test_loss, rmse]), rmse.mean(axis=0)


def _mean(values: Floats) -> Floats:
    """Average over the first axis; of one value, that value bit for bit."""
    return np.asarray(values[0] if len(values) == 1 else values.mean(axis=0))


def _failed(members: Sequence[MemberCurve], seconds: float, reason: str) -> Progress:
    alone = members[0] if len(members) == 1 else None
    return Progress(
        epochs=max((len(each.objectives) for each in members), default=0),
        objective=math.nan,
        best_epoch=-1,
        rmse={},
        train_loss=math.nan,
        test_loss=math.nan,
        seconds=seconds,
        curve={name: list(series) for name, series in alone.curve.items()} if alone else {},
        objectives=list(alone.objectives) if alone else [],
        reason=reason,
    )


def member_progress(
    curve: Mapping[str, Sequence[float]],
    objectives: Sequence[float],
    seconds: float,
    epoch: int,
) -> Progress:
    """Say where one training stood after `epoch`, by its own curve."""
    return Progress(
        epochs=len(objectives),
        objective=objectives[epoch],
        best_epoch=epoch,
        rmse={band: curve[band][epoch] for band in BANDS},
        train_loss=curve["train_loss"][epoch],
        test_loss=curve["test_loss"][epoch],
        seconds=seconds,
    )
