"""The classical model's voice in a committee: how much it counts, and a network that speaks for it.

On nights that neither has seen, networks and the formula of Krisciunas & Schaefer err differently:
the formula knows what a few dozen nights do not show, a network what the formula leaves out. So
their mean is better than either. Both count alike unless predictions of rows that neither saw say
otherwise: weights that are estimated are seldom better than equal ones (Smith & Wallis 2009,
Oxford Bulletin of Economics and Statistics 71, 331, on the mean of forecasts), since what is
estimated from a few dozen nights is mostly noise. So of the weights whose objective lies within
one standard error of the lowest the one nearest to a half is taken. Where there are many nights
the error is small, and where networks know all that the formula does, it has no weight.

A checkpoint holds a network. So a small one is trained to give what the fitted formula gives, on
made-up conditions, as many as it takes. Where it cannot (the formula is a step at the horizon, in
rows with and without a Moon) the formula has no voice: what is exported is what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from desisky_tune.data.columns import BANDS, NIGHT
from desisky_tune.errors import SearchError
from desisky_tune.inference.bootstrap import night_weights
from desisky_tune.inference.predictor import apply_model
from desisky_tune.io.header import read_header
from desisky_tune.models.classical import CLASSICAL_FEATURES, ClassicalModel
from desisky_tune.search.baselines import Predict
from desisky_tune.search.finalists import OutOfFold, predict_out_of_fold
from desisky_tune.search.folds import observed
from desisky_tune.search.trial_files import voice_path

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from desisky_tune.inference.bootstrap import Floats
    from desisky_tune.search.origin import SearchRun

#: Width and depth of the network that speaks for the classical model.
SHAPE = {"width": 64, "depth": 3}

#: Resamples of the nights: their spread is then known to 2 %.
DRAWS = 1000

#: A share below this is none; and so much is left to the networks.
LEAST_SHARE = 0.02

#: How far the network may be from the formula on the rows' own conditions, in any band (mag).
TOLERANCE = 0.02

#: Made-up conditions, how many of them only validate, and how the network is trained on the rest.
CONDITIONS, MEASURED = 18432, 2048
EPOCHS, BATCH, RATE = 60, 64, 1e-2

#: Of the conditions, those that are near to real ones; the rest fills their range and its margin.
NEAR = 0.75

#: How far the conditions go beyond the observed range, in spreads; near ones are moved by half of
#: it. No feature is lowered below this part of its lowest value, where all values are positive.
MARGIN, LOWEST = 0.1, 0.7

#: What a feature can be.
LIMITS = {
    "MOONSEP": (0.0, 180.0),
    "OBSALT": (0.0, 90.0),
    "MOONALT": (-90.0, 90.0),
    "MOONFRAC": (0.0, 1.0),
    "ECLIPSE_FRAC": (0.0, 1.0),
}


@dataclass(frozen=True)
class Voice:
    """What the classical model says of rows that it did not see, and how much that counts.

    Attributes
    ----------
    share
        Its weight in the mean, above 0 and below 1.
    by_fold
        Likewise, found without the rows of each fold.
    unseen
        Its predictions.
    """

    share: float
    by_fold: tuple[float, ...]
    unseen: OutOfFold

    def on_folds(self, fold: np.ndarray) -> Floats:
        """Return the share with which each row is predicted, found without the rows of its fold."""
        return np.array(self.by_fold)[fold]

    def among(self, networks: OutOfFold) -> OutOfFold:
        """Return what networks and voice together make of the rows, none of which they saw.

        The share with which a row is predicted was found without the rows of its fold.
        """
        share = self.on_folds(networks.fold)[:, np.newaxis]
        return replace(
            networks,
            predictions=(1 - share) * networks.predictions + share * self.unseen.predictions,
        )


def hear_classical(run: SearchRun, networks: OutOfFold) -> Voice | None:
    """Weigh the classical model against networks; None where it has nothing to add.

    Parameters
    ----------
    run
        The run. Its test rows are not looked at.
    networks
        What they predict out of fold, ``(1, n, 4)``.
    """
    if not can_speak(run):
        return None
    unseen = classical_out_of_fold(run)
    nights = run.table.frame[NIGHT].to_numpy()[networks.rows]
    folds = range(int(networks.fold.max()) + 1)
    among = [None, *(networks.fold != each for each in folds)]
    share, *by_fold = (
        min(share_of(networks, unseen, nights, rows), 1 - LEAST_SHARE) for rows in among
    )
    if share < LEAST_SHARE or not _is_faithful(write_voice(run)):
        return None
    return Voice(share, tuple(by_fold), unseen)


def can_speak(run: SearchRun) -> bool:
    """Whether a run asks for the classical model, and its features are enough for it."""
    features = run.spec.data.features
    return run.spec.evaluation.classical and all(name in features for name in CLASSICAL_FEATURES)


def fit_classical(run: SearchRun, rows: np.ndarray) -> ClassicalModel:
    """Fit the classical model, by the run's features alone, to rows of it."""
    conditions = run.table.frame.iloc[rows][list(run.spec.data.features)]
    return ClassicalModel.fit(conditions, observed(run, rows))


def classical_out_of_fold(run: SearchRun) -> OutOfFold:
    """Predict the training and validation rows, each by a fit to the other folds."""
    features = list(run.spec.data.features)

    def fit(rows: np.ndarray) -> dict[str, Predict]:
        model = fit_classical(run, rows)
        return {"classical": lambda frame: model.predict(frame[features])}

    return predict_out_of_fold(run, fit)["classical"]


def share_of(
    first: OutOfFold, second: OutOfFold, nights: np.ndarray, among: np.ndarray | None = None
) -> float:
    """Return the weight of `second` in the mean of both, in hundredths.

    Of the weights whose objective lies within one standard error of the lowest, it is the one
    nearest to a half. The objective is the mean of the bands' RMSE; the error is that of the
    difference, over the same resampled nights for both. One night has no error: a half.

    Parameters
    ----------
    first, second
        Predictions ``(1, n, 4)`` of the same rows.
    nights
        The night of each row, ``(n,)``.
    among
        Which of the rows count, ``(n,)``; all by default.
    """
    rows = np.ones(len(nights), dtype=bool) if among is None else among
    one, other = ((each.predictions[0] - each.observed)[rows] for each in (first, second))
    weights = night_weights(nights[rows], DRAWS)
    if weights.drawn.shape[1] == 1:
        return 0.5
    # By night: exposures, and the sums that the squares of a weighted mean are made of.
    parts = np.stack([np.ones_like(one), one**2, one * other, other**2], axis=1)
    by_night = weights.sums(parts)
    shares = np.linspace(0, 1, 101)[:, np.newaxis]

    def objectives(totals: np.ndarray) -> np.ndarray:
        count, first_squares, products, second_squares = np.moveaxis(totals, -2, 0)[..., None, :]
        squares = (
            (1 - shares) ** 2 * first_squares
            + 2 * shares * (1 - shares) * products
            + shares**2 * second_squares
        )
        return np.asarray(np.sqrt(np.maximum(squares / count, 0)).mean(axis=-1))

    objective = objectives(by_night.sum(axis=0))
    best = int(np.argmin(objective))
    resampled = objectives(np.tensordot(weights.drawn, by_night, axes=1))
    error = np.std(resampled - resampled[:, [best]], axis=0, ddof=1)
    tied = np.flatnonzero(objective - objective[best] <= error)
    return float(shares[tied[np.argmin(np.abs(tied - len(shares) // 2))], 0])


@dataclass(frozen=True)
class Imitation:
    """A network that gives what the classical model gives.

    Attributes
    ----------
    network
        On raw features.
    rmse
        How far it is from it, by band (mag), on the rows' own conditions.
    """

    network: Any
    rmse: dict[str, float]


def imitate(
    model: ClassicalModel, frame: pd.DataFrame, features: Sequence[str], seed: int
) -> Imitation:
    """Train a network on the magnitudes of a classical model.

    Parameters
    ----------
    model
        To be imitated.
    frame
        Rows whose conditions say where: their range and somewhat more.
    features
        Of the network, in their order.
    seed
        Of the conditions and the training.

    Raises
    ------
    SearchError
        When the training diverged.
    """
    from desisky_tune.training.program import Hyperparameters, program_for, training_arrays
    from desisky_tune.training.scaling import Scaling, fold

    made = make_conditions(frame, features, CONDITIONS, np.random.default_rng(seed))
    magnitudes = model.predict(dict(zip(features, made.T, strict=True)))
    inputs, targets = made.astype(np.float32), magnitudes.astype(np.float32)
    scaling = Scaling.fit(inputs[MEASURED:], targets[MEASURED:])
    program = program_for(
        in_size=len(features),
        out_size=len(BANDS),
        **SHAPE,
        batch_size=BATCH,
        loss="l2",
        select="rmse",
        validate_every=EPOCHS,
        epochs=EPOCHS,
        extended=True,
    )
    arrays = training_arrays(
        inputs[MEASURED:], targets[MEASURED:], inputs[:MEASURED], targets[:MEASURED], scaling
    )
    rates = Hyperparameters(RATE, schedule="cosine", epochs=EPOCHS)
    state, curve = program.advance(program.init(seed), arrays, rates, EPOCHS)
    if curve.failed:
        raise SearchError("a network that should imitate the classical model diverged")
    network = fold(program.last_model(state), scaling)
    real = frame[list(features)]
    difference = apply_model(network, real.to_numpy(dtype=np.float32)) - model.predict(real)
    rmse = np.sqrt(np.mean(difference**2, axis=0))
    return Imitation(network, dict(zip(BANDS, map(float, rmse), strict=True)))


def write_voice(run: SearchRun) -> Path:
    """Write the network that speaks for the classical model, fitted to all rows but the test rows.

    Returns
    -------
    Path
        A checkpoint in the run's folder, on raw features. One that lies there is taken.
    """
    from desisky_tune.io import checkpoint_meta, save
    from desisky_tune.search.final_fit import fitted_rows, fitted_split
    from desisky_tune.search.origin import checkpoint_header
    from desisky_tune.training.scaling import Scaling

    path = voice_path(run.folder.trials)
    run.folder.fetched(path)
    if path.exists():
        return path
    rows, features = fitted_rows(run), run.spec.data.features
    model = fit_classical(run, rows)
    made = imitate(model, run.table.frame.iloc[rows], features, run.spec.training.seed)
    header = checkpoint_header(run)
    meta = checkpoint_meta(
        made.network,
        features=features,
        scaling=Scaling.fit(*run.table.arrays(rows, features)),
        **{
            **header,
            "classical": model.as_dict(),
            "imitated_to": made.rmse,
            "split": fitted_split(run, header["split"]),
            "seed": run.spec.training.seed,
        },
    )
    return save(path, made.network, meta)


def make_conditions(
    frame: pd.DataFrame, features: Sequence[str], count: int, draw: np.random.Generator
) -> Floats:
    """Return made-up conditions ``(count, f)``, shuffled.

    Each feature is drawn by itself: most near to a value that it had, the others anywhere in
    its range. One that never changes stays as it is.
    """
    real = frame[list(features)].to_numpy(dtype=float)
    lowest, highest = real.min(axis=0), real.max(axis=0)
    margin = MARGIN * (highest - lowest)
    low = np.maximum(lowest - margin, np.where(lowest > 0, LOWEST * lowest, -np.inf))
    high = highest + margin
    for place, name in enumerate(features):
        least, most = LIMITS.get(name, (-np.inf, np.inf))
        if margin[place]:
            low[place], high[place] = max(low[place], least), min(high[place], most)
    near = round(NEAR * count)
    close = np.stack([draw.choice(column, near) for column in real.T], axis=1)
    close += margin / 2 * draw.standard_normal(close.shape)
    wide = draw.uniform(low, high, (count - near, len(features)))
    return np.asarray(draw.permutation(np.clip(np.concatenate([close, wide]), low, high)))


def _is_faithful(path: Path) -> bool:
    """Whether the network of a checkpoint says what the formula says."""
    distances = read_header(path)["imitated_to"].values()
    return all(distance <= TOLERANCE for distance in distances)
