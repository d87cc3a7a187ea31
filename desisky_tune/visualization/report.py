"""The report of a run: one page that needs nothing else, and its figures beside it.

The page shows what the search found and how the winner does. Figures of the test rows are
those that the search measured (`evaluation.json`); everything by row is drawn from the
validation rows, and no test row is read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import desisky_tune
from desisky_tune.data.columns import BANDS, TARGETS
from desisky_tune.errors import RunError
from desisky_tune.files import atomic_open
from desisky_tune.inference import Predictor
from desisky_tune.models.classical import ClassicalModel
from desisky_tune.search.hyperparameters import switched_on
from desisky_tune.search.importance import FEWEST_TRIALS, importances
from desisky_tune.search.leaderboard import leaderboard
from desisky_tune.search.space import resolved_dict
from desisky_tune.visualization import contents
from desisky_tune.visualization import intervals as of_nights
from desisky_tune.visualization import moon_map as moon
from desisky_tune.visualization import search as of_search
from desisky_tune.visualization import winner as of_winner
from desisky_tune.visualization.panels import save_panel
from desisky_tune.visualization.style import NAMES, UNITS
from desisky_tune.visualization.winner import MODELS, Predictions, band_name

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from desisky_tune.search.loaded import LoadedRun
    from desisky_tune.search.records import TrialRecord

PAGE = "index.html"
_TEMPLATE = "report.html.j2"

#: Trials whose learning curves are drawn, and that the first table lists.
BEST_CURVES = 5
BEST_ROWS = 10
#: How far the winner's RMSE may lie from the one that the search measured (mag): another
#: machine rounds float32 otherwise, other weights or rows do not come that close.
TOLERANCE = 2e-3


def write_report(run: LoadedRun, out: str | Path | None = None) -> Path:
    """Write a run's report.

    Parameters
    ----------
    run
        The run, from `desisky_tune.load_run`.
    out
        The folder to write; ``report`` in the run's folder by default.

    Returns
    -------
    Path
        The page, `index.html`; its figures lie beside it as PNG and SVG.

    Raises
    ------
    RunError
        When the search has no winner yet, or its files do not belong together.
    StorageError
        When a file cannot be written.
    """
    _require_winner(run)
    assert run.evaluation is not None
    assert run.checkpoint is not None
    folder = Path(out) if out is not None else run.path / "report"
    data, map_, classical_map = _predictions(run)
    intervals = of_nights.model_intervals(run)
    panels: dict[str, list[dict[str, str]]] = {}
    for section, name, caption, draw in _figures(run, data, (map_, classical_map), intervals):
        svg = save_panel(draw(), folder, name)
        panels.setdefault(section, []).append({"name": name, "caption": caption, "svg": svg})
    content = {
        "version": desisky_tune.__version__,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "run": run,
        "winner": run.winner,
        "panels": panels,
        "evaluation": run.evaluation,
        "models": [(name, title) for name, title in MODELS.items() if name in _measured(run)],
        "bands": [(band, band_name(band, data.v_derived)) for band in BANDS],
        "v_derived": data.v_derived,
        "facts": contents.facts(run),
        "space": contents.space(run),
        "board": contents.board(run),
        "board_limit": BEST_ROWS,
        "finalists": contents.finalists(run, data.v_derived),
        "trial_intervals": of_nights.trial_intervals(run, _best(run.records)[:BEST_ROWS]),
        "intervals": intervals,
        "draws": of_nights.DRAWS,
        "most_rows": contents.MOST_ROWS,
        "hyperparameters": of_search.HYPERPARAMETERS,
        "switched_on": switched_on(record.configuration for record in run.records),
        "fewest_trials": FEWEST_TRIALS,
        "rungs": contents.rung_counts(run),
        "eclipse": contents.eclipse(data, run),
        "map": map_,
        "cost": contents.cost(run),
        "checkpoint": run.checkpoint.relative_to(run.path).as_posix(),
    }
    page = _environment().get_template(_TEMPLATE).render(content)
    with atomic_open(folder / PAGE, "w", encoding="utf-8") as stream:
        stream.write(page)
    return folder / PAGE


def draw_figures(run: LoadedRun, names: Sequence[str] | None = None) -> dict[str, Figure]:
    """Draw the figures of a run's report.

    Parameters
    ----------
    run
        The run, from `desisky_tune.load_run`.
    names
        Which ones, as their files are called; all by default.

    Returns
    -------
    dict
        `matplotlib.figure.Figure` by name, in the page's order.

    Raises
    ------
    RunError
        When the search has no winner yet, or a name is none of a figure.
    """
    _require_winner(run)
    data, map_, classical_map = _predictions(run)
    drawings = {
        name: draw
        for _, name, _, draw in _figures(
            run, data, (map_, classical_map), of_nights.model_intervals(run)
        )
    }
    for name in names or ():
        if name not in drawings:
            raise RunError(f"figure {name!r}: the report of {run.path} has {', '.join(drawings)}")
    return {name: draw() for name, draw in drawings.items() if names is None or name in names}


def _require_winner(run: LoadedRun) -> None:
    if run.winner is None or run.evaluation is None or run.checkpoint is None:
        raise RunError(
            f"{run.path}: the search has no winner yet; "
            f"finish it with 'desisky-tune resume {run.path}'"
        )


def _chosen_on(run: LoadedRun) -> str:
    """How the rows are called that the winner was chosen on."""
    by_folds = (run.evaluation or {}).get("validated_on") == "folds"
    return "folds of the training and validation rows" if by_folds else "validation rows"


def _predictions(run: LoadedRun) -> tuple[Predictions, moon.MoonMap, moon.MoonMap]:
    """The winner and the classical model on the validation rows, and the map of each."""
    train, validation = run.rows("train"), run.rows("validation")
    predictor = Predictor.load(run.checkpoint)
    by_fold = run.out_of_fold()
    if by_fold is not None:
        return _predictions_by_fold(run, predictor, by_fold)
    classical = ClassicalModel.fit(train, train[list(TARGETS)].to_numpy(dtype=float))
    assert run.evaluation is not None
    data = Predictions(
        frame=validation,
        observed=validation[list(TARGETS)].to_numpy(dtype=float),
        winner=predictor.predict(validation),
        classical=classical.predict(validation),
        v_derived=bool(run.evaluation["v_derived"]),
    )
    for name, predicted in (("winner", data.winner), ("classical", data.classical)):
        known = _measured(run)[name]["validation"]
        rmse = np.sqrt(np.mean((predicted - data.observed) ** 2, axis=0))
        away = float(np.abs(rmse - [known[band] for band in BANDS]).max())
        if not away <= TOLERANCE:
            raise RunError(
                f"{run.path}: the {MODELS[name]} is {away:.4f} mag away from its RMSE in "
                "evaluation.json; checkpoint, rows and evaluation do not belong together"
            )
    maps = [moon.moon_map(train, predict) for predict in (predictor.predict, classical.predict)]
    return data, maps[0], maps[1]


def _predictions_by_fold(
    run: LoadedRun, predictor: Predictor, rows: pd.DataFrame
) -> tuple[Predictions, moon.MoonMap, moon.MoonMap]:
    """What the finalists' folds gave: rows that no training had seen.

    The checkpoint was fitted to these rows; it has to give the RMSE that it had then.
    """
    assert run.evaluation is not None
    observed = rows[list(TARGETS)].to_numpy(dtype=float)
    rmse = np.sqrt(np.mean((predictor.predict(rows) - observed) ** 2, axis=0))
    known = run.evaluation["final_fit"]["rmse"]
    away = float(np.abs(rmse - [known[band] for band in BANDS]).max())
    if not away <= TOLERANCE:
        raise RunError(
            f"{run.path}: the winner is {away:.4f} mag away from its RMSE in "
            "evaluation.json; checkpoint, rows and evaluation do not belong together"
        )
    data = Predictions(
        frame=rows,
        observed=observed,
        winner=rows[[f"winner_{band}" for band in BANDS]].to_numpy(dtype=float),
        classical=rows[[f"classical_{band}" for band in BANDS]].to_numpy(dtype=float),
        v_derived=bool(run.evaluation["v_derived"]),
    )
    classical = ClassicalModel.fit(rows, observed)
    maps = [moon.moon_map(rows, predict) for predict in (predictor.predict, classical.predict)]
    return data, maps[0], maps[1]


def _figures(
    run: LoadedRun,
    data: Predictions,
    maps: tuple[moon.MoonMap, moon.MoonMap],
    intervals: of_nights.Intervals,
) -> Iterator[tuple[str, str, str, Callable[[], Figure]]]:
    """Yield section, name, caption and drawing of each figure, in the page's order."""
    assert run.winner is not None
    records, winner = run.records, run.winner
    space = resolved_dict(run.spec)["space"]
    best = _best(records)[:BEST_CURVES]
    searched = of_search.searched_names(space)
    names = ", ".join(data.band_name(band) for band in BANDS)

    yield (
        "comparison", "comparison",
        f"RMSE by band: {_chosen_on(run)} (full, with 95 % intervals) and test rows (hollow).",
        lambda: of_winner.plot_comparison(_measured(run), data.v_derived, intervals),
    )  # fmt: skip
    yield (
        "search", "history",
        "Optimisation history: the mean RMSE of the bands at each trial's best epoch.",
        lambda: of_search.plot_history(records),
    )  # fmt: skip
    if len(best) > 1 and searched:
        yield (
            "search", "parallel-coordinates",
            "Complete trials as lines through their hyperparameters: the winner bold, the best "
            "quarter in orange.",
            lambda: of_search.plot_parallel_coordinates(records, space),
        )  # fmt: skip
    if len({record.parameters for record in best}) > 1:
        yield (
            "search", "pareto",
            "RMSE against the size of the model; on the front no other trial beats both.",
            lambda: of_search.plot_pareto(records),
        )  # fmt: skip
    found = importances(run.spec, records)
    if found:
        yield (
            "search", "importance",
            "Importance of the hyperparameters among the complete trials; bars: 16 to 84 % "
            "when the trials are drawn anew.",
            lambda: of_search.plot_importance(found),
        )  # fmt: skip
    yield (
        "search", "rungs",
        "What the scheduler saw: the best RMSE so far at each rung, and where trials were "
        "stopped.",
        lambda: of_search.plot_rungs(records),
    )  # fmt: skip
    for name in searched:
        yield (
            "slices", f"slice-{name.replace('_', '-')}",
            f"{of_search.HYPERPARAMETERS.get(name, name).split(' [')[0]}.",
            lambda name=name: of_search.plot_slice(records, name, space),  # type: ignore[misc]
        )  # fmt: skip
    yield (
        "learning", "learning-curves",
        f"Validation RMSE (mean of the bands) of the {len(best)} best trials.",
        lambda: of_search.plot_best_curves(best),
    )  # fmt: skip
    yield (
        "learning", "winner-curves",
        f"The winner's losses and its validation RMSE in {names}. "
        "Dashed: its best epoch.",
        lambda: of_search.plot_winner_curves(
            winner, run.spec.training.loss.capitalize(), data.v_derived
        ),
    )  # fmt: skip
    for band in BANDS:
        yield (
            "predictions", f"prediction-{band}",
            f"{data.band_name(band)}: prediction against observation.",
            lambda band=band: of_winner.plot_predictions(data, band),  # type: ignore[misc]
        )  # fmt: skip
    for feature in run.spec.data.features:
        if data.frame[feature].nunique() > 1:
            yield (
                "residuals", f"residuals-{feature.lower().replace('_', '-')}",
                f"Residuals against {NAMES.get(feature, feature)}"
                + (f" [{UNITS[feature]}]." if feature in UNITS else "."),
                lambda feature=feature: of_winner.plot_residuals_against(  # type: ignore[misc]
                    data, feature
                ),
            )  # fmt: skip
    yield (
        "residuals", "residuals-night",
        "Median residual of each night, with its 16 to 84 % range.",
        lambda: of_winner.plot_residuals_by_night(data),
    )  # fmt: skip
    yield (
        "distributions", "distributions", f"Distributions of the magnitudes in {names}.",
        lambda: of_winner.plot_distributions(data),
    )  # fmt: skip
    yield (
        "distributions", "colours", "Colours g - r and r - z.",
        lambda: of_winner.plot_colours(data),
    )  # fmt: skip
    for band in BANDS:
        yield (
            "map", f"moon-map-{band}",
            f"{data.band_name(band)}: predicted brightness around the Moon, one scale for both.",
            lambda band=band: moon.plot_moon_map(  # type: ignore[misc]
                {"winner": maps[0], "classical model": maps[1]}, band, data.v_derived
            ),
        )  # fmt: skip


def _measured(run: LoadedRun) -> Mapping[str, Any]:
    assert run.evaluation is not None
    figures: Mapping[str, Any] = run.evaluation["figures"]
    return figures


def _best(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The complete trials, best first."""
    numbers = leaderboard(records).query("state == 'COMPLETE'")["trial"].tolist()
    by_number = {record.number: record for record in records}
    return [by_number[int(number)] for number in numbers]


def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("desisky_tune.visualization"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["mag"] = lambda value: "-" if value is None else f"{value:.4f}"
    environment.filters["span"] = lambda ends: f"{ends[0]:.3f} to {ends[1]:.3f}"
    environment.filters["percent"] = lambda value: f"{100 * value:.0f} %"
    environment.filters["short"] = lambda value: "-" if value is None else f"{value:.3g}"
    environment.filters["setting"] = lambda value: (
        value if isinstance(value, str) else f"{value:.4g}"
    )
    environment.filters["whole"] = lambda value: "-" if value is None else f"{int(value):,}"
    environment.filters["duration"] = duration
    return environment


def duration(seconds: float) -> str:
    """Return a time with its units: '8.2 s', '3 min 20 s', '2 h 5 min'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
