"""Does choosing help on nights that no stage saw? Nested, on the SV1 exposures.

Outer folds hold out whole nights. On the others everything is done as in a search, without
Ray: a random search on one holdout, finalists on folds and seeds, final fits, the ensemble,
a transfer, the baselines. Every model then predicts the nights held out. The draw of the
outer folds is repeated; all comparisons are paired.

Figure of merit: squared errors pooled over the outer folds per band, then RMSE, then the
mean of the bands; the epoch of every network is fixed without the nights that it is scored
on. Each finished outer fold is a line of the file of `--out`: what is there already is not
trained again.

    python benchmarks/nested.py --out nested.jsonl --repeats 10 --processes 2
    python benchmarks/nested.py --out nested.jsonl --report-only
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
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
    t_interval,
)

from desisky_tune.data.columns import BANDS, EXPOSURE_ID, NIGHT, TARGETS
from desisky_tune.data.features import load_features
from desisky_tune.data.splits import make_folds
from desisky_tune.inference.bootstrap import interval, night_weights, resampled_rmse

#: How the models are called, in the order of the table.
LABELS: Mapping[str, str] = {
    "committee": "committee with the classical model's voice; what is exported",
    "networks": "committee without it: one training a fold, of the best finalists in turn",
    "winner_mean": "finalists' winner, fitted to all rows with 5 seeds",
    "winner": "finalists' winner, fitted to all rows once",
    "ensemble": "ensemble of the best finalists' members, with the classical model's voice",
    "single": "best single validation score",
    "transfer": "transfer: pretrained on the classical model, fine-tuned",
    "default": "documented default, scaled, fitted to all rows once",
    "default_mean": "documented default, scaled, fitted to all rows with 5 seeds",
    "default_folds": "documented default, scaled, the mean of one training a fold",
    "default_voice": "the same with the classical model's voice",
    "default_single": "documented default, scaled, on the holdout",
    "default_raw": "documented default, raw inputs, on the holdout",
    "trees": "gradient-boosted trees",
    "classical": "classical model",
    "constant": "constant",
}
#: What the others are compared with.
REFERENCE = "default"
#: What names a line of a file, and what must agree between all of them.
CELL = ("repeat", "fold")
SETTINGS = ("outer", "trials", "epochs", "finalists", "folds", "seeds", "members", "space")


def main() -> None:
    """Train what is missing, and print the tables."""
    options = parsed()
    settings = {name: getattr(options, name) for name in SETTINGS}
    known = {(line["repeat"], line["fold"]) for line in read_lines(options.out, settings, CELL)}
    cells = [
        (repeat, fold)
        for repeat in range(options.repeats)
        for fold in range(options.outer)
        if (repeat, fold) not in known
    ]
    print(describe(["desisky_tune", "jax", "equinox", "scikit-learn"]), end="\n\n", flush=True)
    if not options.report_only:
        in_processes(train_cell, cells, settings, options.out, options.processes, "outer folds")
    lines = [
        line for line in read_lines(options.out, settings, CELL) if line["repeat"] < options.repeats
    ]
    print(report(lines, settings))


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("nested.jsonl"))
    parser.add_argument("--repeats", type=int, default=10, help="draws of the outer folds")
    parser.add_argument("--outer", type=int, default=5, help="outer folds")
    add_selection_options(parser)
    return parser.parse_args()


# --- one outer fold ------------------------------------------------------------------------------


def train_cell(settings: Mapping[str, Any], repeat: int, fold: int) -> dict[str, Any]:
    """Search, choose and fit without one outer fold's nights, and predict them."""
    began = time.perf_counter()
    with own_folder("nested") as folder:
        cell = Cell(folder, repeat, fold, settings)
        predictions, promised, chosen = cell.outcome()
        scored = cell.scored
    return {
        "repeat": repeat,
        "fold": fold,
        "settings": dict(settings),
        "exposures": scored[EXPOSURE_ID].tolist(),
        "predictions": rounded(predictions),
        "promised": promised,
        "chosen": chosen,
        "seconds": round(time.perf_counter() - began, 1),
    }


def rounded(predictions: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return predictions by model as JSON has them."""
    return {name: np.round(each, 5).tolist() for name, each in predictions.items()}


def outer_fold(
    repeat: int, fold: int, settings: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to work with and the rows to score on: no night is in both."""
    frame = load_features().frame
    return make_folds(frame, np.arange(len(frame)), folds=settings["outer"], seed=repeat)[fold]


class Cell(Stages):
    """A search on the nights of one outer fold's complement."""

    def __init__(self, folder: Path, repeat: int, fold: int, settings: Mapping[str, Any]) -> None:
        from desisky_tune.data.splits import Split
        from desisky_tune.search.folder import RunFolder
        from desisky_tune.search.origin import SearchRun, write_run

        seed = 1000 * repeat + fold
        self.members = settings["members"]
        spec = selection_spec(settings, seed)
        table = load_features()
        inside, scored = outer_fold(repeat, fold, settings)
        # As in a search of the shipped spaces: a quarter of the rows to choose on.
        train, validation = make_folds(table.frame, inside, folds=4, seed=seed)[0]
        split = Split(train, validation, scored, NIGHT, seed, (0.6, 0.2, 0.2))
        run = SearchRun(RunFolder.create(folder, "cell", exact=True), spec, table, split)
        write_run(run)
        super().__init__(run, seed)

    def outcome(self) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
        """Return predictions by model, what was promised, and what was chosen."""
        from desisky_tune.inference import EnsemblePredictor, Predictor
        from desisky_tune.search.baselines import fit_baselines
        from desisky_tune.search.ensemble import fit_ensemble, write_ensemble
        from desisky_tune.search.final_fit import fit_of, fitted_rows, write_final_fit
        from desisky_tune.search.local import checkpoint_path, final_path
        from desisky_tune.search.records import best_record

        run, trials, scored = self.run, self.run.folder.trials, self.scored
        records = self.search()
        single = best_record(records)
        assert single is not None
        final = self.finalists(records)
        files = {
            "single": checkpoint_path(trials, single.number),
            "default_single": checkpoint_path(trials, 0),
        }
        for name, finalist in (("winner", final.winner), ("default", final.default)):
            assert finalist is not None
            files[name] = final_path(trials, finalist.number)
            write_final_fit(run, fit_of(final.records[finalist.number], {}), files[name])
        predictions = {name: Predictor.load(path).predict(scored) for name, path in files.items()}
        fit = fit_ensemble(run, final, self.members)
        ensemble = write_ensemble(run, fit, run.folder.ensemble)
        predictions["ensemble"] = EnsemblePredictor.load(ensemble).predict(scored)
        for name, finalist in (("winner", final.winner), ("default", final.default)):
            fit = self.mean_fit(name, final.records[finalist.number])
            predictions[f"{name}_mean"] = fit.predict(scored)
        committees = self.committees(final)
        predictions |= {name: each.predict(scored) for name, (_, each) in committees.items()}
        alike = self.members_mean(final.default.number, scored)
        predictions["default_folds"] = alike
        predictions["default_voice"], share = self.with_voice(final, alike)
        predictions["transfer"] = self.transfer(scored)
        predictions["default_raw"] = self.raw_default(scored)
        baselines = fit_baselines(run, fitted_rows(run))
        predictions |= {name: predict(scored) for name, predict in baselines.items()}
        out_of_fold = final.errors[final.winner.number]
        promised = {
            "single": {"rows": len(run.split.validation), "rmse": single.rmse},
            "winner": {
                "rows": len(out_of_fold.rows),
                "rmse": final.records[final.winner.number].rmse,
            },
            **{
                name: {"rows": len(out_of_fold.rows), "rmse": each.rmse}
                for name, (each, _) in committees.items()
            },
        }
        voice = committees["committee"][0].voice
        chosen = {
            "single": dict(single.configuration),
            "winner": dict(final.winner.configuration),
            "default_epochs": final.records[final.default.number].best_epoch,
            "shares": {
                "committee": 0.0 if voice is None else voice.share,
                "default": share,
            },
        }
        return predictions, promised, chosen

    @property
    def scored(self) -> Any:
        """The exposures of the outer fold."""
        return self.run.table.frame.iloc[self.run.split.test]

    def with_voice(self, final: Any, predictions: np.ndarray) -> tuple[np.ndarray, float]:
        """Return the documented default's predictions with the classical model's voice.

        The voice has the share that the folds give it; that share comes along.
        """
        from desisky_tune.search.classical_voice import fit_classical, hear_classical
        from desisky_tune.search.ensemble import mean_out_of_fold
        from desisky_tune.search.final_fit import fitted_rows

        voice = hear_classical(self.run, mean_out_of_fold(final, [final.default.number]))
        if voice is None:
            return predictions, 0.0
        spoken = fit_classical(self.run, fitted_rows(self.run)).predict(self.scored)
        return (1 - voice.share) * predictions + voice.share * spoken, voice.share

    def transfer(self, scored: Any) -> np.ndarray:
        """Pretrain the documented default on made-up rows, fine-tune it, predict.

        The made-up rows: conditions of the training rows, mixed and spread, with the
        magnitudes of the classical model, whose constants were fitted to these nights
        alone. (The simulator's own were fitted to the SV1 exposures, the scored ones too.)
        The epoch of the fine-tuning is that of the pooled curve over the finalists' folds.
        """
        from desisky_tune.search.backend import Member
        from desisky_tune.search.final_fit import fitted_rows
        from desisky_tune.search.folds import finalist_folds
        from desisky_tune.search.pooling import MemberCurve, pool
        from desisky_tune.training.scaling import Scaling, fold

        table, epochs = self.run.table, self.run.spec.training.epochs
        curves = []
        for number, (train, validation) in enumerate(finalist_folds(self.run)):
            weights = pretrained(table.frame.iloc[train], self.seed)
            scaling = Scaling.fit(*table.arrays(train))
            _, curve = fine_tune(
                weights, scaling, table.arrays(train), table.arrays(validation), epochs
            )
            series = dict(zip(BANDS, np.asarray(curve.rmse, float).T, strict=True))
            series |= {"train_loss": curve.train_loss, "test_loss": curve.test_loss}
            curves.append(MemberCurve(Member(number), len(validation), series, curve.objective))
        rows = fitted_rows(self.run)
        arrays = table.arrays(rows)
        scaling = Scaling.fit(*arrays)
        weights = pretrained(table.frame.iloc[rows], self.seed)
        model, _ = fine_tune(weights, scaling, arrays, arrays, pool(curves).best_epoch + 1)
        from desisky_tune.inference import Predictor

        return Predictor(fold(model, scaling)).predict(scored)

    def raw_default(self, scored: Any) -> np.ndarray:
        """Train the documented default on raw inputs for 500 epochs, the best epoch kept."""
        from desisky_tune.inference import Predictor
        from desisky_tune.training.program import training_arrays

        table, split = self.run.table, self.run.split
        arrays = training_arrays(*table.arrays(split.train), *table.arrays(split.validation))
        program, hyperparameters = default_program(500)
        state, _ = program.advance(program.init(0), arrays, hyperparameters, 500)
        return Predictor(program.best_model(state)).predict(scored)


def default_program(epochs: int, learning_rate: float | None = None) -> tuple[Any, Any]:
    """Return the program and the hyperparameters of the documented default."""
    from desisky_tune.search.space import default_configuration
    from desisky_tune.training.program import Hyperparameters, program_for

    default = default_configuration()
    program = program_for(
        in_size=6,
        out_size=len(BANDS),
        width=int(default["width"]),
        depth=int(default["depth"]),
        batch_size=int(default["batch_size"]),
        select="rmse",
        epochs=epochs,
    )
    rate = float(default["learning_rate"]) if learning_rate is None else learning_rate
    return program, Hyperparameters(rate, float(default["huber_delta"]))


def pretrained(frame: Any, seed: int, rows: int = 2000, epochs: int = 60) -> Any:
    """Return weights, on raw features, of a training on the classical model's magnitudes."""
    from desisky_tune.data.columns import FEATURES
    from desisky_tune.models.classical import ClassicalModel
    from desisky_tune.training.program import training_arrays
    from desisky_tune.training.scaling import Scaling, fold

    draw = np.random.default_rng(seed)
    physics = ClassicalModel.fit(frame, frame[list(TARGETS)].to_numpy(dtype=float))
    real = frame[list(FEATURES)].to_numpy(dtype=float)
    # Each feature by itself: a condition of one exposure, moved by a tenth of the spread.
    made = np.stack([draw.choice(column, rows) for column in real.T], axis=1)
    made += 0.1 * real.std(axis=0) * draw.standard_normal(made.shape)
    made = np.clip(made, real.min(axis=0), real.max(axis=0))
    conditions = dict(zip(FEATURES, made.T, strict=True))
    magnitudes = np.asarray(physics.predict(conditions))
    usable = np.isfinite(magnitudes).all(axis=1)
    inputs, targets = made[usable].astype(np.float32), magnitudes[usable].astype(np.float32)
    scaling = Scaling.fit(inputs, targets)
    program, hyperparameters = default_program(epochs, learning_rate=1e-3)
    arrays = training_arrays(inputs, targets, inputs, targets, scaling)
    state, _ = program.advance(program.init(seed), arrays, hyperparameters, epochs)
    return fold(program.last_model(state), scaling)


def fine_tune(
    weights: Any, scaling: Any, train: Any, validation: Any, epochs: int
) -> tuple[Any, Any]:
    """Train given weights on, in the scaling of the new rows; return the last model."""
    from desisky_tune.training.program import training_arrays
    from desisky_tune.training.scaling import unfold

    program, hyperparameters = default_program(epochs)
    arrays = training_arrays(*train, *validation, scaling)
    state = program.init(0, unfold(weights, scaling))
    state, curve = program.advance(state, arrays, hyperparameters, epochs)
    return program.last_model(state), curve


# --- the tables ----------------------------------------------------------------------------------


def report(lines: list[dict[str, Any]], settings: Mapping[str, Any]) -> str:
    """Return the tables as Markdown."""
    whole = [
        repeat
        for repeat in sorted({line["repeat"] for line in lines})
        if sum(line["repeat"] == repeat for line in lines) == settings["outer"]
    ]
    if not whole:
        return "no draw of the outer folds is complete yet"
    frame = load_features().frame.set_index(EXPOSURE_ID).sort_index()
    squared = {name: squared_errors(lines, name, whole, frame) for name in models_of(lines)}
    weights = night_weights(frame[NIGHT].to_numpy())
    spent = sum(line["seconds"] for line in lines)
    head = (
        f"{len(whole)} draws of {settings['outer']} outer folds by night over {len(frame)} "
        f"exposures of {frame[NIGHT].nunique()} nights; {settings['trials']} trials, "
        f"{settings['finalists']} finalists on {settings['folds']} folds x {settings['seeds']} "
        f"seeds, {settings['epochs']} epochs; {spent:.0f} s of processes. V is derived from g "
        "and r."
    )
    return "\n\n".join(
        [
            head,
            shares_line(lines),
            rmse_table(squared, weights),
            difference_table(squared, weights),
            optimism_table(lines, whole, squared, weights),
        ]
    )


def shares_line(lines: list[dict[str, Any]]) -> str:
    """Say what weight the classical model had in the committees."""
    shares = [line["chosen"]["shares"]["committee"] for line in lines]
    return (
        f"The classical model's share in the committee: a half in {shares.count(0.5)} of "
        f"{len(shares)} outer folds, {min(shares):.2f} to {max(shares):.2f} in all."
    )


def models_of(lines: list[dict[str, Any]]) -> list[str]:
    """Return the models that every line has, in the order of the table."""
    return [name for name in LABELS if all(name in line["predictions"] for line in lines)]


def squared_errors(
    lines: list[dict[str, Any]], name: str, repeats: list[int], frame: Any
) -> np.ndarray:
    """Return the squared errors ``(repeats, n, 4)`` of a model: every row once a repeat."""
    observed = frame[list(TARGETS)].to_numpy(dtype=float)
    errors = np.full((len(repeats), *observed.shape), np.nan)
    for line in lines:
        if line["repeat"] in repeats:
            places = frame.index.get_indexer(line["exposures"])
            residual = np.array(line["predictions"][name]) - observed[places]
            errors[repeats.index(line["repeat"]), places] = residual**2
    assert np.isfinite(errors).all()
    return errors


def rmse_table(squared: Mapping[str, np.ndarray], weights: np.ndarray) -> str:
    """RMSE by band and the means, with intervals over nights and the spread of the draws."""
    rows = [
        "RMSE (mag) on nights that no stage saw; in brackets 95 % over resampled nights; "
        "± standard deviation over the draws of the folds:",
        "",
        "| | V (derived) | g | r | z | mean V g r z | mean g r z |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, errors in squared.items():
        by_draw = np.sqrt(errors.mean(axis=1))
        resampled = resampled_rmse(errors, weights).mean(axis=1)
        cells = []
        for columns in (*[[band] for band in range(4)], [0, 1, 2, 3], [1, 2, 3]):
            low, high = interval(resampled[:, columns].mean(axis=1))
            text = f"{by_draw[:, columns].mean():.3f} [{low:.3f}, {high:.3f}]"
            if len(columns) > 1 and len(by_draw) > 1:
                text += f" ± {by_draw[:, columns].mean(axis=1).std(ddof=1):.3f}"
            cells.append(text)
        rows.append(f"| {LABELS[name]} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def difference_table(squared: Mapping[str, np.ndarray], weights: np.ndarray) -> str:
    """Paired differences to the reference: over nights, and over the draws."""
    rows = [
        f"Difference to '{LABELS[REFERENCE]}' (mag, negative is better), paired. Over nights: "
        "95 % bootstrap of whole nights. Over draws: 95 % t interval of the mean; the draws "
        "share their exposures, so that it says how far the fold draw matters, no more. Worst: "
        "the largest difference of a draw.",
        "",
        "| | mean V g r z | over nights | mean g r z | over nights | over draws | worst |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, errors in squared.items():
        if name == REFERENCE:
            continue
        cells = []
        for columns in ([0, 1, 2, 3], [1, 2, 3]):
            draws, resampled = paired(errors, squared[REFERENCE], weights, columns)
            low, high = interval(resampled)
            cells += [f"{draws.mean():+.4f}", f"{low:+.4f} to {high:+.4f}"]
        rows.append(
            f"| {LABELS[name]} | "
            + " | ".join([*cells, t_interval(draws), f"{draws.max():+.4f}"])
            + " |"
        )
    return "\n".join(rows)


def paired(
    one: np.ndarray, other: np.ndarray, weights: np.ndarray, columns: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the differences by draw, and those of resampled nights (the mean over draws)."""
    draws = [np.sqrt(each.mean(axis=1))[:, columns].mean(axis=1) for each in (one, other)]
    resampled = [
        resampled_rmse(each, weights)[:, :, columns].mean(axis=(1, 2)) for each in (one, other)
    ]
    return draws[0] - draws[1], resampled[0] - resampled[1]


def optimism_table(
    lines: list[dict[str, Any]],
    repeats: list[int],
    squared: Mapping[str, np.ndarray],
    weights: np.ndarray,
) -> str:
    """What came minus what the selection promised, pooled alike over the outer folds."""
    rows = [
        "Optimism (mag): RMSE on the outer nights minus the RMSE that the selection promised, "
        "both pooled over the outer folds per band, mean of g r z. A single configuration's "
        "promise is that of single trainings; what 5 seeds together would have promised is lower, "
        "and their optimism larger than shown:",
        "",
        "| | promised | came | optimism | over draws |",
        "|---|---|---|---|---|",
    ]
    for name, chosen in (
        ("single", "single"),
        ("winner", "winner"),
        ("winner_mean", "winner"),
        ("networks", "networks"),
        ("committee", "committee"),
    ):
        if name not in squared:
            continue
        promised = np.array([promise(lines, chosen, repeat) for repeat in repeats])
        came = np.sqrt(squared[name].mean(axis=1))[:, 1:].mean(axis=1)
        gap = came - promised
        rows.append(
            f"| {LABELS[name]} | {promised.mean():.4f} | {came.mean():.4f} | "
            f"{gap.mean():+.4f} | {t_interval(gap)} |"
        )
    return "\n".join(rows)


def promise(lines: list[dict[str, Any]], name: str, repeat: int) -> float:
    """Return the promised RMSE of one draw: g r z, pooled over the outer folds."""
    made = [line["promised"][name] for line in lines if line["repeat"] == repeat]
    rows = np.array([each["rows"] for each in made], dtype=float)
    by_band = np.array([[each["rmse"][band] for band in BANDS] for each in made])
    pooled = np.sqrt(np.average(by_band**2, axis=0, weights=rows))
    return float(pooled[1:].mean())


if __name__ == "__main__":
    main()
