"""The committee: trainings of the best finalists on the folds, and their mean as one checkpoint.

Which of the best few finalists is the best cannot be told from a few dozen nights, and what one
training gives depends on the nights that it saw. The mean of trainings that saw different nights
is better on others than any single one is (docs/selection.md has the figures). So what is exported
is the mean of one training a fold, of the best finalists in turn: they are there already, every
row was seen by all of them but one, and the mean of networks is a network
(`desisky_tune.models.mean`). Where the folds say so the classical model has a voice in it
(`desisky_tune.search.classical_voice`).
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
from desisky_tune.search.classical_voice import (
    SHAPE,
    Voice,
    can_speak,
    hear_classical,
    write_voice,
)
from desisky_tune.search.ensemble import best_numbers, mean_out_of_fold
from desisky_tune.search.final_fit import fitted_rows, fitted_split, mean_fits
from desisky_tune.search.finalists import Final, OutOfFold
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


@dataclass(frozen=True)
class Committee:
    """What a run's finalists export.

    Attributes
    ----------
    seats
        Its trainings, which count alike.
    voice
        The classical model's; None where it has none.
    unseen
        What it makes of the training and validation rows, by trainings that did not see them.
    """

    seats: tuple[Seat, ...]
    voice: Voice | None
    unseen: OutOfFold

    @property
    def numbers(self) -> list[int]:
        """The finalists whose trainings it has, the best first."""
        return numbers_of(self.seats)

    @property
    def rmse(self) -> dict[str, float]:
        """RMSE by band (mag) of `unseen`."""
        figures = figures_of(self.unseen.squared)
        return {band: figures[band] for band in BANDS}

    def as_dict(self) -> dict[str, Any]:
        """Return what an evaluation says of it."""
        said = {"trainings": len(self.seats), "finalists": self.numbers}
        return said if self.voice is None else {**said, "classical": self.voice.share}


def form_committee(run: SearchRun, final: Final) -> Committee | None:
    """Return the committee of a run's finalists; None where there is none."""
    if can_speak(run) and (beside := choose_seats(run, final, [SHAPE])):
        networks = mean_out_of_fold(final, numbers_of(beside))
        voice = hear_classical(run, networks)
        if voice is not None:
            return Committee(tuple(beside), voice, voice.among(networks))
    # Without a voice, or where the limit on the weights leaves no room for one.
    seats = choose_seats(run, final)
    if not seats:
        return None
    return Committee(tuple(seats), None, mean_out_of_fold(final, numbers_of(seats)))


def choose_seats(
    run: SearchRun, final: Final, beside: Sequence[Mapping[str, int]] = ()
) -> list[Seat]:
    """Return whose trainings are in the committee of a run's finalists; nobody's where none is.

    A training on each fold, of the best ``evaluation.committee`` finalists in turn (where they are
    more than the folds, more than one on some of them). Fewer where their mean would have more
    weights than a checkpoint may have (`desisky_tune.search.final_fit.mean_fits`), together with
    networks of the shapes `beside`. There is none of one finalist or one training, none where no
    finalists are asked for, and none where the number of weights is an objective of the search.
    """
    spec = run.spec
    if not spec.evaluation.finalists or "parameters" in spec.search.objectives:
        return []
    numbers = best_numbers(final, spec.evaluation.committee)
    # By seed, then by fold: the first so many trainings see as different rows as can be.
    members = sorted(finalist_members(spec), key=lambda member: (member.seed, member.fold))
    count = min(max(spec.evaluation.finalist_folds, len(numbers)), len(members))
    seats = [Seat(numbers[i % len(numbers)], members[i]) for i in range(count)]

    def fits() -> bool:
        of_seats = [final.finalists[seat.number].configuration for seat in seats]
        return mean_fits(spec, [*of_seats, *beside])

    while seats and not fits():
        seats.pop()
    return seats if len({seat.number for seat in seats}) > 1 else []


def write_committee(run: SearchRun, final: Final, committee: Committee, path: Path) -> Path:
    """Write the mean of a committee's trainings, which lie in the run's folder.

    Parameters
    ----------
    run
        The run. Its test rows are not looked at.
    final
        Its finalists.
    committee
        Of them.
    path
        The checkpoint to write; it appears when it is complete.
    """
    from desisky_tune.io import checkpoint_meta, feature_names, load_model, save
    from desisky_tune.models.mean import mean_model
    from desisky_tune.training.scaling import Scaling

    models, metas = [], []
    for seat in committee.seats:
        source = member_path(run.folder.trials, seat.number, seat.member)
        run.folder.fetched(source)
        model, meta = load_model("broadband", path=source)
        models.append(model)
        metas.append(meta)
    spoken = 0.0 if committee.voice is None else committee.voice.share
    shares = [(1 - spoken) / len(models)] * len(models)
    described = [
        {"share": share, **_described(final, seat, meta)}
        for share, seat, meta in zip(shares, committee.seats, metas, strict=True)
    ]
    if spoken:
        network, meta = load_model("broadband", path=write_voice(run))
        models.append(network)
        shares.append(spoken)
        said = {name: meta[name] for name in ("classical", "imitated_to")}
        described.append({"share": spoken, **said, **SHAPE})
    mean = mean_model(models, shares)
    first = committee.numbers[0]
    record = final.records[first]
    header = checkpoint_header(run)
    pretrained = next((meta["pretrain"] for meta in metas if "pretrain" in meta), None)
    meta = checkpoint_meta(
        mean,
        features=feature_names(metas[0]),
        # Each was trained in the scaling of its own rows; the mean is trained on in that of all.
        scaling=Scaling.fit(*run.table.arrays(fitted_rows(run), run.spec.data.features)),
        training={
            "epoch": record.best_epoch,
            **{
                name: float(np.mean([meta["training"][name] for meta in metas]))
                for name in ("test_loss", "train_loss")
            },
            "per_band_rmse": committee.rmse,
            "config": metas[0]["training"]["config"],
        },
        **{
            **header,
            **({} if pretrained is None else {"pretrain": pretrained}),
            "search": {**header["search"], "trial": final.finalists[first].trial},
            "mean_of": described,
            "split": fitted_split(run, header["split"]),
            "seed": record.seed,
        },
    )
    return save(path, mean, meta)


def numbers_of(seats: Sequence[Seat]) -> list[int]:
    """Return the finalists of some seats, the best first."""
    return list(dict.fromkeys(seat.number for seat in seats))


def _described(final: Final, seat: Seat, meta: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "finalist": seat.number,
        "trial": final.finalists[seat.number].trial,
        "fold": seat.member.fold,
        "seed": seat.member.seed,
        "epoch": meta["training"]["epoch"],
        "configuration": dict(final.finalists[seat.number].configuration),
    }
