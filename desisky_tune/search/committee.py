"""The committee: trainings of the best finalists on the folds, and their mean as one checkpoint.

Which of the best few finalists is the best cannot be told from a few dozen nights, and what one
training gives depends on the nights that it saw. The mean of trainings that saw different nights
is better on others than any single one is (docs/selection.md has the figures). So what is exported
is the mean of one training a fold, of the best finalists in turn: they are there already, every
row was seen by all of them but one, and the mean of networks is a network
(`desisky_tune.models.mean`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from desisky_tune.data.columns import BANDS
from desisky_tune.search.accuracy import figures_of
from desisky_tune.search.backend import Member
from desisky_tune.search.ensemble import best_numbers, mean_out_of_fold
from desisky_tune.search.final_fit import fitted_rows, fitted_split, mean_fits
from desisky_tune.search.finalists import Final
from desisky_tune.search.folds import finalist_members
from desisky_tune.search.origin import checkpoint_header
from desisky_tune.search.trial_files import member_path

if TYPE_CHECKING:
    from desisky_tune.search.origin import SearchRun


@dataclass(frozen=True)
class Seat:
    """One training in a committee.

    Attributes
    ----------
    number
        Of the finalist.
    member
        Its fold and seed.
    """

    number: int
    member: Member


def choose_committee(run: SearchRun, final: Final) -> list[Seat]:
    """Return who is in the committee of a run's finalists; nobody where there is none.

    A training on each fold, of the best ``evaluation.committee`` finalists in turn (where they are
    more than the folds, more than one on some of them). Fewer where their mean would have more
    weights than a checkpoint may have (`desisky_tune.search.final_fit.mean_fits`). There is none
    of one finalist or one training, none where no finalists are asked for, and none where the
    number of weights is an objective of the search.
    """
    spec = run.spec
    if not spec.evaluation.finalists or "parameters" in spec.search.objectives:
        return []
    numbers = best_numbers(final, spec.evaluation.committee)
    # By seed, then by fold: the first so many trainings see as different rows as can be.
    members = sorted(finalist_members(spec), key=lambda member: (member.seed, member.fold))
    count = min(max(spec.evaluation.finalist_folds, len(numbers)), len(members))
    seats = [Seat(numbers[i % len(numbers)], members[i]) for i in range(count)]
    while seats and not mean_fits(spec, [final.finalists[s.number].configuration for s in seats]):
        seats.pop()
    return seats if len({seat.number for seat in seats}) > 1 else []


def write_committee(run: SearchRun, final: Final, seats: Sequence[Seat], path: Path) -> Path:
    """Write the mean of a committee's trainings, which lie in the run's folder.

    Parameters
    ----------
    run
        The run. Its test rows are not looked at.
    final
        Its finalists.
    seats
        The committee.
    path
        The checkpoint to write; it appears when it is complete.
    """
    from desisky_tune.io import checkpoint_meta, feature_names, load_model, save
    from desisky_tune.models.mean import mean_model
    from desisky_tune.training.scaling import Scaling

    models, metas = [], []
    for seat in seats:
        source = member_path(run.folder.trials, seat.number, seat.member)
        run.folder.fetched(source)
        model, meta = load_model("broadband", path=source)
        models.append(model)
        metas.append(meta)
    mean = mean_model(models)
    numbers = numbers_of(seats)
    first = final.records[numbers[0]]
    header = checkpoint_header(run)
    pretrained = next((meta["pretrain"] for meta in metas if "pretrain" in meta), None)
    meta = checkpoint_meta(
        mean,
        features=feature_names(metas[0]),
        # Each was trained in the scaling of its own rows; the mean is trained on in that of all.
        scaling=Scaling.fit(*run.table.arrays(fitted_rows(run), run.spec.data.features)),
        training={
            "epoch": first.best_epoch,
            **{
                name: float(np.mean([meta["training"][name] for meta in metas]))
                for name in ("test_loss", "train_loss")
            },
            "per_band_rmse": rmse_out_of_fold(final, numbers),
            "config": metas[0]["training"]["config"],
        },
        **{
            **header,
            **({} if pretrained is None else {"pretrain": pretrained}),
            "search": {**header["search"], "trial": final.finalists[numbers[0]].trial},
            "mean_of": [
                _described(final, seat, meta) for seat, meta in zip(seats, metas, strict=True)
            ],
            "split": fitted_split(run, header["split"]),
            "seed": first.seed,
        },
    )
    return save(path, mean, meta)


def numbers_of(seats: Sequence[Seat]) -> list[int]:
    """Return the finalists of a committee, the best first."""
    return list(dict.fromkeys(seat.number for seat in seats))


def rmse_out_of_fold(final: Final, numbers: Sequence[int]) -> dict[str, float]:
    """Return the RMSE by band (mag) of the mean of finalists on rows that no member saw."""
    figures = figures_of(mean_out_of_fold(final, numbers).squared)
    return {band: figures[band] for band in BANDS}


def _described(final: Final, seat: Seat, meta: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "finalist": seat.number,
        "trial": final.finalists[seat.number].trial,
        "fold": seat.member.fold,
        "seed": seat.member.seed,
        "epoch": meta["training"]["epoch"],
        "configuration": dict(final.finalists[seat.number].configuration),
    }
