"""A run read back: `desisky_tune.load_run`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from desisky_tune.data.columns import EXPOSURE_ID, NIGHT
from desisky_tune.data.parquet import read_parquet
from desisky_tune.errors import RunError
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.records import Ledger, TrialRecord, best_record
from desisky_tune.search.space import SearchSpec, spec_from_dict
from desisky_tune.search.tables import curves_table, trials_table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

#: The parts of the split that may be read again; the test rows are read once, by the search.
READABLE_PARTS = ("train", "validation")


@dataclass(frozen=True)
class LoadedRun:
    """A run as it stands on disk.

    Attributes
    ----------
    path
        The run's folder.
    search
        The content of `search.json`: specification, data, split, seeds, versions.
    spec
        The specification of the search.
    records
        Every finished trial, by number.
    trials, curves
        The columns of ``trials.parquet`` and ``curves.parquet``, from the ledger: a row
        per trial, and a row per trial and epoch. RMSE in mag.
    winner
        The trial that was chosen: the finalists' winner, or else the complete trial with
        the lowest RMSE on the validation rows. None where no trial is complete.
    evaluation
        RMSE (mag) of the winner and the baselines; see `desisky_tune.search.winner`.
        None before the search has ended.
    checkpoint
        The winner's checkpoint; None before the search has ended.
    """

    path: Path
    search: Mapping[str, Any]
    spec: SearchSpec
    records: tuple[TrialRecord, ...]
    trials: pd.DataFrame
    curves: pd.DataFrame
    winner: TrialRecord | None
    evaluation: Mapping[str, Any] | None
    checkpoint: Path | None

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    def rows(self, part: str) -> pd.DataFrame:
        """Read the exposures of ``train`` or ``validation``, ordered by EXPID.

        The test rows cannot be had here: the search has read them once, and their figures
        are in `evaluation`.

        Raises
        ------
        RunError
            When `part` is another one, or the table is missing or not the run's.
        """
        if part not in READABLE_PARTS:
            raise RunError(f"rows of {part!r}: a run gives those of {', '.join(READABLE_PARTS)}")
        features = RunFolder(self.path).features
        wanted = self.search["split"][part]
        try:
            frame = read_parquet(features, filters=[(EXPOSURE_ID, "in", wanted)]).to_pandas()
        except (OSError, ValueError) as error:
            raise RunError(f"{features} cannot be read: {error}") from error
        if sorted(frame[EXPOSURE_ID]) != sorted(wanted):
            raise RunError(
                f"{features}: {len(frame)} of the {len(wanted)} {part} rows that search.json "
                "records; the table was changed"
            )
        return frame.sort_values(EXPOSURE_ID, ignore_index=True)

    def out_of_fold(self) -> pd.DataFrame | None:
        """Read the predictions of the finalists' folds; None where there were no finalists.

        A row per exposure of the training and validation rows, ordered by EXPID, with the
        features and magnitudes, ``fold``, and for each model and band a column such as
        ``winner_V``: predictions by trainings that did not see the row (mag).

        Raises
        ------
        RunError
            When the table cannot be read, or is not of the run's rows.
        """
        import pandas as pd

        path = RunFolder(self.path).out_of_fold
        if not path.exists():
            return None
        try:
            predictions = read_parquet(path).to_pandas().drop(columns=NIGHT)
        except (OSError, ValueError, KeyError) as error:
            raise RunError(f"{path} cannot be read: {error}") from error
        rows = pd.concat([self.rows(part) for part in READABLE_PARTS])
        together = rows.merge(predictions, on=EXPOSURE_ID, validate="one_to_one")
        if len(together) != len(predictions):
            raise RunError(
                f"{path}: {len(predictions)} rows, of which {len(together)} are the run's"
            )
        return together.sort_values(EXPOSURE_ID, ignore_index=True)

    def figures(self, names: Sequence[str] | None = None) -> dict[str, Figure]:
        """Draw the report's figures; see `desisky_tune.visualization.report.draw_figures`."""
        from desisky_tune.visualization.report import draw_figures

        return draw_figures(self, names)

    def report(self, out: str | Path | None = None) -> Path:
        """Write the report; see `desisky_tune.visualization.report.write_report`."""
        from desisky_tune.visualization.report import write_report

        return write_report(self, out)


def load_run(path: str | Path) -> LoadedRun:
    """Read a run's folder.

    Parameters
    ----------
    path
        The folder: ``runs/<name>``.

    Returns
    -------
    LoadedRun

    Raises
    ------
    RunError
        When there is no run, or its files are damaged.
    """
    folder = RunFolder.open(path)
    content = folder.read_search()
    records = sorted(Ledger(folder.ledger).records(), key=lambda record: record.number)
    evaluation = _evaluation(folder)
    return LoadedRun(
        path=folder.path,
        search=content,
        spec=spec_from_dict(content["spec"], where=str(folder.search_json)),
        records=tuple(records),
        trials=trials_table(records).to_pandas(),
        curves=curves_table(records).to_pandas(),
        winner=_winner(folder, records, evaluation),
        evaluation=evaluation,
        checkpoint=folder.best if folder.best.exists() else None,
    )


def _winner(
    folder: RunFolder, records: list[TrialRecord], evaluation: Mapping[str, Any] | None
) -> TrialRecord | None:
    """Return the record of the winner; of a finalist that the search had not tried, its own."""
    if evaluation is None or "winner" not in evaluation:
        return best_record(records)
    every = [*records, *Ledger(folder.finalists).records()]
    return next((each for each in every if each.number == evaluation["winner"]), None)


def _evaluation(folder: RunFolder) -> dict[str, Any] | None:
    if not folder.evaluation.exists():
        return None
    try:
        return dict(json.loads(folder.evaluation.read_text()))
    except (OSError, ValueError) as error:
        raise RunError(f"{folder.evaluation} cannot be read: {error}") from error
