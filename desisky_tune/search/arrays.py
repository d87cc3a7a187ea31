"""The rows that a search may see, and the folds that its trials are measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from desisky_tune.data.columns import FEATURES
from desisky_tune.errors import InputError

if TYPE_CHECKING:
    from desisky_tune.data.features import FeatureTable


class Fold(NamedTuple):
    """Rows to train on and rows to measure on: positions in a pool of rows."""

    train: np.ndarray
    validation: np.ndarray


@dataclass(frozen=True)
class SearchArrays:
    """The rows that a search may see: training and validation, never the test rows.

    Attributes
    ----------
    inputs
        Raw features, float32, (n, f).
    targets
        Magnitudes in V, g, r, z, float32, (n, 4).
    folds
        At least one; a single split is one fold.
    features
        Names of the columns of the inputs.
    """

    inputs: np.ndarray
    targets: np.ndarray
    folds: tuple[Fold, ...]
    features: tuple[str, ...] = FEATURES

    @classmethod
    def from_table(
        cls,
        table: FeatureTable,
        train: np.ndarray,
        validation: np.ndarray,
        features: Sequence[str] = FEATURES,
    ) -> SearchArrays:
        """Take the rows of one split; `train` and `validation` are positions in the table."""
        return cls.from_folds(table, [(train, validation)], features)

    @classmethod
    def from_folds(
        cls,
        table: FeatureTable,
        folds: Sequence[tuple[np.ndarray, np.ndarray]],
        features: Sequence[str] = FEATURES,
    ) -> SearchArrays:
        """Take the rows of several folds, and no other row of the table.

        Parameters
        ----------
        table
            The exposures.
        folds
            Training and validation rows of each, positions in the table. Their order is
            kept: the shuffles of a training go by it.
        features
            Columns of the inputs.

        Raises
        ------
        InputError
            When there is no fold, or a row is in both parts of one.
        """
        if not folds:
            raise InputError("no fold to train on")
        for number, (train, validation) in enumerate(folds):
            shared = np.intersect1d(train, validation)
            if len(shared):
                raise InputError(
                    f"fold {number}: {len(shared)} rows are to be trained and measured on,"
                    f" row {shared[0]} first"
                )
        pool = np.unique(np.concatenate([rows for fold in folds for rows in fold]))
        inputs, targets = table.arrays(pool, features)
        placed = tuple(
            Fold(np.searchsorted(pool, train), np.searchsorted(pool, validation))
            for train, validation in folds
        )
        return cls(inputs, targets, placed, tuple(features))

    def training_rows(self, fold: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and targets of a fold's training rows."""
        rows = self.folds[fold].train
        return self.inputs[rows], self.targets[rows]

    def validation_rows(self, fold: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and targets of a fold's validation rows."""
        rows = self.folds[fold].validation
        return self.inputs[rows], self.targets[rows]
