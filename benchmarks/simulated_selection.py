"""What choosing costs where the truth is known: regret, optimism, coverage, on simulated skies.

One draw is an observatory: about 330 moonlit exposures of a few dozen nights of a simulated
VAC, searched as `benchmarks/nested.py` does it, without Ray: a random search on one holdout by
night, finalists on folds and seeds, final fits, the ensemble with its calibrated spread. The
truth is another simulated season, thousands of exposures with weather of their own, that no stage
sees. The draws share nothing, so that intervals over them mean what they say.

An oracle has the truth in place of the validation rows: its pick is the best of the same trials
there. Regret is the RMSE on the truth of what was picked minus that of the oracle's pick.
Optimism is that RMSE minus the one that the selection promised. The noise is what no model of
these features can know: the scatter of the magnitudes when weather and measurement are drawn
again under the same conditions. Exposures in a lunar eclipse are left out, on both sides.

Each finished draw is a line of the file of `--out`: what is there already is not trained again.

    python benchmarks/simulated_selection.py --out simulated.jsonl --repeats 20 --workers 2
    python benchmarks/simulated_selection.py --out simulated.jsonl --report-only
    python benchmarks/simulated_selection.py --out try.jsonl --repeats 2 --quick
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _machine import describe
from _selecting import (
    Stages,
    add_selection_options,
    in_processes,
    own_folder,
    read_lines,
    selection_spec,
)
from _simulated_tables import report

from desisky_tune.data.columns import BANDS, EXPOSURE_ID, NIGHT, TARGETS

#: What names a line of a file, and what must agree between all of them.
DRAW = ("draw",)
SETTINGS = (
    "exposures",
    "truth",
    "trials",
    "epochs",
    "finalists",
    "folds",
    "seeds",
    "members",
    "space",
)
#: What `--quick` takes: it shows that the script runs, and nothing else.
QUICK = {"truth": 2000, "trials": 4, "epochs": 30, "finalists": 2, "folds": 3, "seeds": 1}

#: Exposures of a draw, and new skies for each, from which the noise is estimated.
NOISE_ROWS, NOISE_SKIES = 96, 6


def main() -> None:
    """Train what is missing, and print the tables."""
    options = parsed()
    settings = {name: getattr(options, name) for name in SETTINGS}
    known = {line["draw"] for line in read_lines(options.out, settings, DRAW)}
    missing = [(draw,) for draw in range(options.repeats) if draw not in known]
    print(describe(["desisky_tune", "jax", "equinox", "optuna"]), end="\n\n", flush=True)
    if not options.report_only:
        in_processes(train_draw, missing, settings, options.out, options.processes, "draws")
    lines = read_lines(options.out, settings, DRAW)
    chosen = sorted(
        (line for line in lines if line["draw"] < options.repeats), key=lambda line: line["draw"]
    )
    print(report(chosen, settings))


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("simulated_selection.jsonl"))
    parser.add_argument("--repeats", type=int, default=20, help="draws of an observatory")
    parser.add_argument(
        "--exposures", type=int, default=1450, help="simulated, a fifth of them moonlit and usable"
    )
    parser.add_argument("--truth", type=int, default=12000, help="exposures simulated as truth")
    add_selection_options(parser)
    parser.add_argument("--quick", action="store_true", help="a small try of the script")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK)
    return options


# --- one draw ------------------------------------------------------------------------------------


def train_draw(settings: Mapping[str, Any], draw: int) -> dict[str, Any]:
    """Search, choose and fit on one observatory's exposures; ask the truth."""
    began = time.perf_counter()
    with own_folder("simulated") as folder:
        outcome = Draw(folder, draw, settings).outcome()
    seconds = round(time.perf_counter() - began, 1)
    return {"draw": draw, "settings": dict(settings), **outcome, "seconds": seconds}


def sample_seed(draw: int) -> int:
    """Return the seed of the season that an observatory observes."""
    return 2 * draw + 1


def truth_seed(draw: int) -> int:
    """Return the seed of the season that is the truth."""
    return 2 * draw + 2


def moonlit(exposures: int, seed: int) -> Any:
    """Return the moonlit exposures of a simulated season, eclipses left out."""
    from desisky_tune.data.simulated_table import simulated_table

    frame = simulated_table(exposures, seed)
    used = ["TRANSPARENCY_GFA", *TARGETS]
    usable = np.isfinite(frame[used].to_numpy(dtype=float)).all(axis=1)
    kept = frame[usable & (frame["ECLIPSE_FRAC"] == 0)]
    return kept.sort_values(EXPOSURE_ID, ignore_index=True)


class Draw(Stages):
    """A search on the exposures of one simulated observatory."""

    def __init__(self, folder: Path, draw: int, settings: Mapping[str, Any]) -> None:
        from desisky_tune.data.features import FeatureTable, fingerprint
        from desisky_tune.data.splits import Split, make_folds
        from desisky_tune.search.folder import RunFolder
        from desisky_tune.search.origin import SearchRun, write_run

        self.draw, self.settings = draw, settings
        frame = moonlit(settings["exposures"], sample_seed(draw))
        self.truth = moonlit(settings["truth"], truth_seed(draw))
        self.observed = self.truth[list(TARGETS)].to_numpy(dtype=float)
        provenance = {"source": "simulated", "v_derived": False, "fingerprint": fingerprint(frame)}
        # As in a search of the shipped spaces: a quarter of the rows to choose on. The truth
        # stands for the test rows.
        train, validation = make_folds(frame, np.arange(len(frame)), folds=4, seed=draw)[0]
        split = Split(train, validation, np.arange(0), NIGHT, draw, (0.6, 0.2, 0.2))
        run = SearchRun(
            RunFolder.create(folder, "draw", exact=True),
            selection_spec(settings, draw),
            FeatureTable(frame, provenance),
            split,
        )
        write_run(run)
        super().__init__(run, draw)

    def outcome(self) -> dict[str, Any]:
        """Return what the selection promised and chose, and what the truth says of it."""
        from desisky_tune.search.records import best_record

        records = self.search()
        trials = self.trials_on_truth(records)
        single = best_record(records)
        assert single is not None
        final = self.finalists(records)
        winner, default = final.winner, final.default
        assert winner.trial is not None
        assert default is not None
        oracle = best_of(trials)
        fits = {
            "winner": final.records[winner.number],
            "default": final.records[default.number],
            "oracle_fit": self.on_the_folds(oracle, final, records),
        }
        models = {name: self.rmse(self.mean_fit(name, each)) for name, each in fits.items()}
        picks = {"oracle": oracle, "single": single.number, "winner_trial": winner.trial}
        models |= {name: trials[number] for name, number in picks.items()}
        models |= {"default_trial": trials[0], "middle": middle_of(trials)}
        for name, finalist in (("winner_folds", winner), ("default_folds", default)):
            models[name] = self.members_rmse(finalist.number)
        models["ensemble"], spread = self.ensemble(final)
        committees = self.committees(final)
        models |= {name: self.rmse(each) for name, (_, each) in committees.items()}
        on_folds = self.members_mean(default.number, self.truth)
        models["default_mean"] = rmse_by_band(on_folds - self.observed)
        promised = {
            "single": by_band(single.rmse),
            "winner_folds": by_band(fits["winner"].rmse),
            **{name: by_band(each.rmse) for name, (each, _) in committees.items()},
            "default_trial": by_band(records[0].rmse),
            "default_folds": by_band(fits["default"].rmse),
        }
        return {
            "rows": self.counts(),
            "models": models,
            "promised": promised,
            "chosen": {name: dict(records[number].configuration) for name, number in picks.items()},
            "trials": {
                str(number): [records[number].objective, each] for number, each in trials.items()
            },
            "noise": self.noise(),
            **spread,
        }

    def counts(self) -> dict[str, int]:
        """Return how many exposures and nights there are to learn from, to choose on, as truth."""
        frame, split = self.run.table.frame, self.run.split
        return {
            "exposures": len(frame),
            "nights": int(frame[NIGHT].nunique()),
            "validation": len(split.validation),
            "validation_nights": int(frame[NIGHT].iloc[split.validation].nunique()),
            "truth": len(self.truth),
            "truth_nights": int(self.truth[NIGHT].nunique()),
        }

    def rmse(self, predictor: Any) -> list[float]:
        """Return a model's RMSE on the truth, by band (mag)."""
        return rmse_by_band(predictor.predict(self.truth) - self.observed)

    def trials_on_truth(self, records: Sequence[Any]) -> dict[int, list[float]]:
        """Return the RMSE on the truth of every complete trial's weights, by number."""
        from desisky_tune.inference import Predictor
        from desisky_tune.search.local import checkpoint_path

        return {
            record.number: self.rmse(
                Predictor.load(checkpoint_path(self.run.folder.trials, record.number))
            )
            for record in records
            if record.state == "COMPLETE"
        }

    def on_the_folds(self, trial: int, final: Any, records: Sequence[Any]) -> Any:
        """Return a trial's record on the finalists' folds, trained there where it was none."""
        for finalist in final.finalists.values():
            if finalist.trial == trial and final.records[finalist.number].state == "COMPLETE":
                return final.records[finalist.number]
        number = 1 + max(final.finalists)
        configuration = records[trial].configuration
        (record,) = self.on_folds({number: configuration}, self.run.folder.path / "oracle.jsonl")
        return record

    def members_rmse(self, number: int) -> list[float]:
        """Return the RMSE on the truth of a finalist's trainings, the mean over them."""
        from desisky_tune.inference import Predictor
        from desisky_tune.search.local import member_path

        each = [
            self.rmse(Predictor.load(member_path(self.run.folder.trials, number, member)))
            for member in self.finalist_members
        ]
        return np.mean(each, axis=0).tolist()

    def ensemble(self, final: Any) -> tuple[list[float], dict[str, Any]]:
        """Write the ensemble; return its RMSE, and how often its 90 % interval holds the truth."""
        from desisky_tune.inference import PREDICTIONS, predict_frame
        from desisky_tune.inference.ensemble import HALF_WIDTHS, INDEX, SIGMAS
        from desisky_tune.search.ensemble import fit_ensemble, write_ensemble

        fit = fit_ensemble(self.run, final, self.settings["members"])
        folder = write_ensemble(self.run, fit, self.run.folder.ensemble)
        predicted = predict_frame(folder, self.truth)
        residual = predicted[list(PREDICTIONS)].to_numpy() - self.observed
        half = predicted[list(HALF_WIDTHS)].to_numpy()
        by_rows = self.quantile_by_rows(fit) * predicted[list(SIGMAS)].to_numpy()
        index = json.loads((folder / INDEX).read_text())
        stated = index["calibration"]["coverage_90"]
        return rmse_by_band(residual), {
            "covered": covered(residual, half),
            "half_width": half.mean(axis=0).tolist(),
            "stated": [stated[band] for band in BANDS],
            "covered_by_rows": covered(residual, by_rows),
            "half_width_by_rows": by_rows.mean(axis=0).tolist(),
        }

    def quantile_by_rows(self, fit: Any) -> np.ndarray:
        """Return the calibration's quantile as if every exposure were a night of its own."""
        from desisky_tune.inference.ensemble import Calibration

        residual = fit.mean.predictions[0] - fit.mean.observed
        return Calibration.fit(residual, fit.scatter, np.arange(len(residual))).quantile_90

    def noise(self) -> list[float]:
        """Return the scatter of the magnitudes under the same conditions, by band (mag).

        Airglow, aerosol and measurement are drawn anew for exposures of the observatory; their
        transparency, which is a feature, stays.
        """
        from desisky_tune.data.simulate import draw_season, draw_weather

        season = draw_season(self.settings["exposures"], sample_seed(self.draw))
        rng = np.random.default_rng(self.draw)
        moonlit_rows = self.run.table.frame[EXPOSURE_ID].to_numpy()
        drawn = rng.choice(moonlit_rows, min(NOISE_ROWS, len(moonlit_rows)), replace=False)
        rows = np.flatnonzero(np.isin(season.columns[EXPOSURE_ID], drawn))
        skies = []
        for stream in rng.spawn(NOISE_SKIES):
            weather = draw_weather(season.plan.night_index, stream)
            weather = replace(weather, transparency=season.weather.transparency)
            skies.append(sky_magnitudes(replace(season, weather=weather), rows, stream))
        return np.sqrt(np.var(skies, axis=0, ddof=1).mean(axis=0)).tolist()


def sky_magnitudes(season: Any, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return magnitudes ``(k, 4)`` of exposures of a season, measured anew."""
    from desisky_tune.data.photometry import magnitudes
    from desisky_tune.data.simulate import (
        FLUX_ERROR,
        MAGNITUDE_ERROR,
        Sky,
        measured_flux,
        vac_wavelength,
    )

    grey = np.exp(FLUX_ERROR * rng.standard_normal(len(season.grey)))
    wavelength = vac_wavelength()
    flux = measured_flux(Sky(wavelength), replace(season, grey=grey), rows)
    bands = magnitudes(flux, wavelength, BANDS)
    # V is measured on the spectrum; g, r and z have an error of the table beside it.
    bands[:, 1:] += MAGNITUDE_ERROR * rng.standard_normal((len(rows), 3))
    return bands


# --- arithmetic ----------------------------------------------------------------------------------


def rmse_by_band(residual: np.ndarray) -> list[float]:
    """Return the RMSE of residuals ``(n, 4)``, by band."""
    return np.sqrt((residual**2).mean(axis=0)).tolist()


def by_band(rmse: Mapping[str, float]) -> list[float]:
    """Return a record's RMSE in the order of the bands."""
    return [rmse[band] for band in BANDS]


def best_of(trials: Mapping[int, Sequence[float]]) -> int:
    """Return the number of the trial with the lowest mean over the bands."""
    return min(trials, key=lambda number: (float(np.mean(trials[number])), number))


def middle_of(trials: Mapping[int, Sequence[float]]) -> list[float]:
    """Return the RMSE by band of the trial in the middle: half of the others are better."""
    order = sorted(trials, key=lambda number: (float(np.mean(trials[number])), number))
    return list(trials[order[len(order) // 2]])


def covered(residual: np.ndarray, half_width: np.ndarray) -> list[float]:
    """Return the share of residuals ``(n, 4)`` inside their half widths, by band."""
    return (np.abs(residual) <= half_width).mean(axis=0).tolist()


if __name__ == "__main__":
    main()
