"""Finalists: chosen, trained on folds in the same run, ranked, and the winner fitted anew."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest

import desisky_tune
from desisky_tune import load_run
from desisky_tune.cli import main
from desisky_tune.data.columns import BANDS, FEATURES, TARGETS
from desisky_tune.data.features import FeatureTable, load_features
from desisky_tune.data.splits import make_split
from desisky_tune.errors import DataError, InputError, RunError
from desisky_tune.inference import PREDICTIONS, Predictor, predict_frame
from desisky_tune.io import load_model, read_header
from desisky_tune.models.classical import ClassicalModel
from desisky_tune.search.backend import Assignment
from desisky_tune.search.classical_voice import LEAST_SHARE, share_of
from desisky_tune.search.export import export_trial
from desisky_tune.search.final_fit import FinalFit, fitted_rows, write_final_fit
from desisky_tune.search.finalists import (
    OutOfFold,
    choose_finalists,
    conclude_finalists,
    fixed_finalists,
)
from desisky_tune.search.folder import RunFolder
from desisky_tune.search.folds import finalist_arrays, finalist_members
from desisky_tune.search.leaderboard import finalists_board, leaderboard
from desisky_tune.search.local import LocalBackend, checkpoint_path
from desisky_tune.search.origin import SearchRun, write_run
from desisky_tune.search.records import Ledger, TrialRecord, finish
from desisky_tune.search.run import SearchResult, resume_search, run_search
from desisky_tune.search.space import default_configuration, load_spec
from desisky_tune.visualization.intervals import trial_intervals

OVERRIDES = (
    "search.trials=4",
    "training.epochs=9",
    "search.grace=3",
    "search.reduction=3",
    "resources.workers=1",
    "space.width={choices: [8, 16]}",
    "space.depth={low: 1, high: 2}",
    "evaluation.finalists=3",
    "evaluation.finalist_folds=3",
    "evaluation.finalist_seeds=2",
)


@pytest.fixture(scope="module")
def result(ray_instance: Any, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    runs = tmp_path_factory.mktemp("runs")
    return run_search(load_spec("quick", OVERRIDES), runs=runs, name="final")


def search_of(result: SearchResult) -> dict[str, Any]:
    return dict(json.loads((result.run_dir / "search.json").read_text()))


def test_finalists_are_kept_apart_from_the_search(result: SearchResult) -> None:
    folder = RunFolder(result.run_dir)
    assert [record.number for record in result.records] == [0, 1, 2, 3]
    finalists = sorted(Ledger(folder.finalists).records(), key=lambda record: record.number)
    assert [record.number for record in finalists] == [4, 5, 6]
    assert {record.state for record in finalists} == {"COMPLETE"}
    assert {record.members for record in finalists} == {6}
    assert all(record.spread is not None and record.spread > 0 for record in finalists)
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{folder.study}")
    assert [trial.number for trial in study.trials] == [0, 1, 2, 3]
    assert sorted(leaderboard(result.run_dir)["trial"]) == [0, 1, 2, 3]
    assert default_configuration() in [record.configuration for record in finalists]


def test_folds_are_recorded_and_share_no_night(result: SearchResult) -> None:
    recorded, split = search_of(result)["finalists"], search_of(result)["split"]
    frame = pd.read_parquet(result.run_dir / "features.parquet").set_index("EXPID")
    nights = [set(frame.loc[fold, "NIGHT"]) for fold in recorded["folds"]]
    tested = set(frame.loc[split["test"], "NIGHT"])
    assert sum(map(len, nights)) == len(set.union(*nights))
    assert not set.union(*nights) & tested
    validated = [exposure for fold in recorded["folds"] for exposure in fold]
    assert sorted(validated) == sorted(split["train"] + split["validation"])
    assert recorded["seeds"] == [0, 1]


def test_objectives_are_those_of_the_kept_weights(result: SearchResult) -> None:
    """Recomputed here from the members' files, fold by fold, without the package's pooling."""
    folder = RunFolder(result.run_dir)
    folds = search_of(result)["finalists"]["folds"]
    frame = pd.read_parquet(folder.features).set_index("EXPID")
    for record in Ledger(folder.finalists).records():
        by_seed = []
        for seed in (0, 1):
            residuals = []
            for fold, exposures in enumerate(folds):
                rows = frame.loc[exposures]
                path = folder.trials / f"{record.number:05d}-fold{fold}-seed{seed}.eqx"
                predicted = Predictor.load(path).predict(rows)
                residuals.append(predicted - rows[list(TARGETS)].to_numpy())
            by_seed.append(np.sqrt(np.mean(np.concatenate(residuals) ** 2, axis=0)))
        assert record.objective == pytest.approx(np.mean(by_seed), abs=1e-4)
        for place, band in enumerate(BANDS):
            assert (record.rmse or {})[band] == pytest.approx(
                np.mean(by_seed, axis=0)[place], abs=1e-4
            )


def test_the_winner_is_fitted_to_all_rows_but_the_test_rows(result: SearchResult) -> None:
    evaluation, split = result.evaluation, search_of(result)["split"]
    header = read_header(result.checkpoint)
    assert header["search"]["trial"] == evaluation["winner"] == result.winner.number
    assert header["split"]["train"] == sorted(split["train"] + split["validation"])
    assert header["split"]["test"] == sorted(split["test"])
    best = evaluation["finalists"][0]
    assert evaluation["final_fit"]["seeds"] == [0, 1, 2, 3, 4]
    assert evaluation["final_fit"]["epochs"] == best["best_epoch"] + 1
    assert evaluation["final_fit"]["rows"] == len(split["train"]) + len(split["validation"])


def test_the_export_is_the_mean_of_a_training_on_each_fold(
    result: SearchResult, tmp_path: Path
) -> None:
    board = result.evaluation["finalists"]
    numbers = [each["number"] for each in board]
    header = read_header(result.checkpoint)
    members = header["mean_of"]
    voice = members[-1]
    # Three finalists on three folds: each on one.
    assert [(each["finalist"], each["fold"], each["seed"]) for each in members[:-1]] == [
        (number, fold, 0) for fold, number in enumerate(numbers)
    ]
    share = members.pop()["share"]
    assert {each["share"] for each in members} == {(1 - share) / 3}
    assert result.evaluation["final_fit"]["committee"] == {
        "trainings": 3,
        "finalists": numbers,
        "classical": share,
    }
    widths = [each["configuration"]["width"] for each in board]
    assert header["arch"]["width_size"] == sum(widths) + voice["width"]
    depths = [each["configuration"]["depth"] for each in board]
    assert header["arch"]["depth"] == max(*depths, voice["depth"])

    folder = RunFolder(result.run_dir)
    frame = pd.read_parquet(folder.features)
    each = [
        Predictor.load(folder.trials / f"{number:05d}-fold{fold}-seed0.eqx").predict(frame)
        for fold, number in enumerate(numbers)
    ]
    mean = Predictor.load(result.checkpoint).predict(frame)
    classical = ClassicalModel.from_dict(voice["classical"]).predict(frame)
    together = (1 - share) * np.mean(each, axis=0) + share * classical
    # A network speaks for the formula.
    assert np.sqrt(np.mean((mean - together) ** 2)) < 0.03

    # By itself a finalist is fitted to all of the rows.
    alone = read_header(export_trial(result.run_dir, tmp_path / "alone.eqx", numbers[0]))
    width = board[0]["configuration"]["width"]
    assert alone["mean_of"] == {"width": width, "seeds": [0, 1, 2, 3, 4]}
    assert alone["search"]["final_fit"] is True
    assert alone["training"]["config"]["epochs"] == board[0]["best_epoch"] + 1


def test_a_committee_is_trained_on_in_the_scaling_of_all_its_rows(result: SearchResult) -> None:
    header, split = read_header(result.checkpoint), search_of(result)["split"]
    frame = pd.read_parquet(result.run_dir / "features.parquet").set_index("EXPID")
    rows = frame.loc[split["train"] + split["validation"], header["features"]]
    np.testing.assert_allclose(header["scaling"]["input_mean"], rows.mean(), rtol=1e-4, atol=1e-6)


def test_a_committee_is_measured_by_members_that_did_not_see_a_row(result: SearchResult) -> None:
    """Recomputed here from the members' files, fold by fold, and so is the classical model."""
    folder = RunFolder(result.run_dir)
    frame = pd.read_parquet(folder.features).set_index("EXPID")
    folds = search_of(result)["finalists"]["folds"]
    parts = []
    for fold, exposures in enumerate(folds):
        rows = frame.loc[exposures]
        others = frame.loc[[each for other in folds if other != exposures for each in other]]
        predicted = [
            Predictor.load(path).predict(rows)
            for path in folder.trials.glob(f"*-fold{fold}-seed*.eqx")
        ]
        assert len(predicted) == 3 * 2
        formula = ClassicalModel.fit(others, others[list(TARGETS)].to_numpy())
        both = np.mean(predicted, axis=0), formula.predict(rows)
        parts.append((*both, rows[list(TARGETS)].to_numpy(), rows["NIGHT"].to_numpy()))
    residuals = []
    for fold, (networks, classical, observed, _) in enumerate(parts):
        elsewhere = [part for other, part in enumerate(parts) if other != fold]
        one, two, truth, nights = (np.concatenate(each) for each in zip(*elsewhere, strict=True))
        places = np.arange(len(nights))
        share = share_of(
            *(OutOfFold(places, places * 0, each[None], truth) for each in (one, two)), nights
        )
        share = min(share, 1 - LEAST_SHARE)
        residuals.append((1 - share) * networks + share * classical - observed)
    rmse = np.sqrt(np.mean(np.concatenate(residuals) ** 2, axis=0))
    figures = result.evaluation["figures"]["winner"]["validation"]
    np.testing.assert_allclose([figures[band] for band in BANDS], rmse, atol=1e-4)
    told = read_header(result.checkpoint)["training"]["per_band_rmse"]
    np.testing.assert_allclose([told[band] for band in BANDS], rmse, atol=1e-4)


def test_figures_are_those_of_the_files(result: SearchResult) -> None:
    split = search_of(result)["split"]
    frame = pd.read_parquet(result.run_dir / "features.parquet").set_index("EXPID")
    model, _ = load_model("broadband", path=result.checkpoint)
    for part, exposures in (("test", split["test"]), ("fit", split["train"] + split["validation"])):
        rows = frame.loc[exposures]
        predicted = np.array([model(row) for row in rows[list(FEATURES)].to_numpy(np.float32)])
        residual = predicted.astype(float) - rows[list(TARGETS)].to_numpy()
        expected = np.sqrt(np.mean(residual**2, axis=0))
        figures = (
            result.evaluation["final_fit"]["rmse"]
            if part == "fit"
            else result.evaluation["figures"]["winner"]["test"]
        )
        np.testing.assert_allclose([figures[band] for band in BANDS], expected, atol=2e-5)
    # Each is tested as a mean over seeds, and so it is validated.
    rows = load_run(result.run_dir).out_of_fold()
    assert rows is not None
    for name in ("winner", "alone", "default", "ensemble"):
        given = rows[[f"{name}_{band}" for band in BANDS]].to_numpy()
        expected = np.sqrt(np.mean((given - rows[list(TARGETS)].to_numpy()) ** 2, axis=0))
        validated = result.evaluation["figures"][name]["validation"]
        np.testing.assert_allclose([validated[band] for band in BANDS], expected)
    for name in ("winner", "alone", "default", "classical", "constant"):
        for part in ("validation", "test"):
            low, high = result.evaluation["intervals"][name][part]["mean"]
            assert low < high


def test_out_of_fold_predictions_of_the_baselines_saw_no_row_of_their_fold(
    result: SearchResult,
) -> None:
    rows = load_run(result.run_dir).out_of_fold()
    assert rows is not None
    for fold in rows["fold"].unique():
        inside = rows["fold"] == fold
        mean = rows.loc[~inside, list(TARGETS)].mean()
        given = rows.loc[inside, [f"constant_{band}" for band in BANDS]]
        np.testing.assert_allclose(given, np.tile(mean, (inside.sum(), 1)), rtol=1e-12)


def test_the_run_reads_back_with_its_winner(result: SearchResult) -> None:
    run = load_run(result.run_dir)
    assert run.winner is not None
    assert run.winner.number == result.winner.number
    board = finalists_board(result.run_dir)
    assert board is not None
    assert list(board["rank"]) == [1, 2, 3]
    # A trial has seen the other rows of the folds: its interval is of those that chose it.
    for record in run.records:
        if record.state == "COMPLETE":
            low, high = trial_intervals(run, [record])[record.number]["mean"]
            assert low < float(record.objective or 0) < high
    page = run.report().read_text()
    ranked = page.split('<table id="finalists">')[1].split("</table>")[0]
    rows = [re.findall(r"<td>([^<]*)</td>", row) for row in ranked.split("<tr")[2:]]
    assert [float(row[2]) for row in rows] == [round(each, 4) for each in board["objective"]]
    assert [int(row[0]) for row in rows] == [1, 2, 3]
    numbers = ", ".join(str(each["number"]) for each in result.evaluation["finalists"])
    assert f"the mean of 3 trainings on folds, of the finalists {numbers} in turn" in page
    # What the page calls its figures is where they come from.
    assert "RMSE on the folds" in page
    assert '<td class="text">validation</td>' not in page.split('id="comparison"')[1]


def test_boards_of_the_command(result: SearchResult, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["leaderboard", str(result.run_dir)]) == 0
    assert "finalists, over folds" in capsys.readouterr().out
    assert main(["leaderboard", str(result.run_dir), "--finalists", "--json"]) == 0
    board = json.loads(capsys.readouterr().out)
    assert [row["rank"] for row in board] == [1, 2, 3]
    assert board[0]["objective"] == result.evaluation["finalists"][0]["objective"]


def test_the_ensemble_is_the_mean_of_its_checkpoints(
    result: SearchResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "ensemble"
    assert main(["export", str(result.run_dir), str(folder), "--ensemble"]) == 0
    index = json.loads((folder / "ensemble.json").read_text())
    assert len(index["members"]) == 3 * 3 * 2 + 1
    share = result.evaluation["final_fit"]["committee"]["classical"]
    np.testing.assert_allclose(index["weights"], [*([(1 - share) / 18] * 18), share])
    assert read_header(folder / index["members"][-1])["classical"] is not None
    frame = pd.read_parquet(result.run_dir / "features.parquet").set_index("EXPID")
    rows = frame.loc[search_of(result)["split"]["test"]]
    inputs = rows[list(FEATURES)].to_numpy(np.float32)
    single = []
    for name in index["members"]:
        model, _ = load_model("broadband", path=folder / name)
        single.append([np.asarray(model(row), float) for row in inputs])
    mean = np.average(single, axis=0, weights=index["weights"])
    predicted = predict_frame(folder, rows)
    np.testing.assert_allclose(predicted[list(PREDICTIONS)], mean, atol=2e-5)
    rmse = np.sqrt(np.mean((mean - rows[list(TARGETS)].to_numpy()) ** 2, axis=0))
    figures = result.evaluation["figures"]["ensemble"]["test"]
    np.testing.assert_allclose([figures[band] for band in BANDS], rmse, atol=2e-5)
    assert (predicted[[f"SKY_MAG_{band}_PRED_SIGMA" for band in "VGRZ"]] > 0).all(axis=None)
    assert set(result.evaluation["ensemble"]["coverage_90"]) == set(BANDS)
    # It was fitted to the training and validation rows, and says so.
    capsys.readouterr()
    arguments = ["evaluate", str(folder), "--split-from", str(result.run_dir), "--rows", "test"]
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["figures"]["checkpoint"]["mean"] == pytest.approx(figures["mean"], abs=1e-6)


def test_a_finalist_and_a_trial_are_exported(result: SearchResult, tmp_path: Path) -> None:
    winner = export_trial(result.run_dir, tmp_path / "winner.eqx")
    assert winner.read_bytes() == result.checkpoint.read_bytes()
    last = result.evaluation["finalists"][-1]
    header = read_header(export_trial(result.run_dir, tmp_path / "last.eqx", last["number"]))
    assert header["search"]["finalist"] == last["number"]
    assert header["training"]["config"]["epochs"] == last["best_epoch"] + 1
    own = read_header(export_trial(result.run_dir, tmp_path / "own.eqx", 0))
    assert "final_fit" not in own["search"]


def test_what_is_fetched_of_a_run_exports_the_same(result: SearchResult, tmp_path: Path) -> None:
    assert main(["fetch", "final", str(tmp_path), "--runs", str(result.run_dir.parent)]) == 0
    assert main(["export", str(tmp_path / "final"), str(tmp_path / "winner.eqx")]) == 0
    assert (tmp_path / "winner.eqx").read_bytes() == result.checkpoint.read_bytes()


def test_rows_that_the_winner_was_fitted_to_are_none_to_validate_on(
    result: SearchResult, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, split = str(result.checkpoint), search_of(result)["split"]
    count = len(split["validation"])
    arguments = ["evaluate", checkpoint, "--rows", "validation"]
    assert main([*arguments, "--split-from", str(result.run_dir), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert f"{count} of {count} rows measured on are training rows" in told["notes"]
    assert main(arguments) == 2
    assert "fitted to the validation rows of its split, too" in capsys.readouterr().err


def test_files_of_the_end_that_were_lost_are_made_again(
    result: SearchResult, tmp_path: Path
) -> None:
    copy = tmp_path / "final"
    shutil.copytree(result.run_dir, copy)
    member = min((copy / "ensemble").glob("*.eqx"))
    (copy / "best" / "final.eqx").unlink()
    member.unlink()
    assert resume_search(copy).evaluation == result.evaluation
    for lost in (Path("best/final.eqx"), member.relative_to(copy)):
        again, before = ((run / lost).read_bytes() for run in (copy, result.run_dir))
        assert again.split(b"\n", 1)[1] == before.split(b"\n", 1)[1]  # a header tells when


def test_a_finished_run_resumes_to_itself(result: SearchResult) -> None:
    before = (result.run_dir / "finalists.jsonl").read_bytes()
    assert resume_search(result.run_dir).evaluation == result.evaluation
    assert (result.run_dir / "finalists.jsonl").read_bytes() == before


def test_a_run_that_was_fetched_says_that_there_is_nothing_to_resume(
    result: SearchResult, tmp_path: Path
) -> None:
    # As `fetch` has it: the result, and not the weights of its trials.
    fetched = tmp_path / "fetched"
    shutil.copytree(result.run_dir, fetched, ignore=shutil.ignore_patterns("trials", "tune"))
    before = (fetched / "evaluation.json").read_bytes()
    with pytest.raises(RunError, match="has finished: there is nothing to resume"):
        resume_search(fetched)
    assert (fetched / "evaluation.json").read_bytes() == before


def test_a_stage_that_was_cut_off_resumes(result: SearchResult, tmp_path: Path) -> None:
    """What a kill leaves in the middle of the finalists: a torn line, a state, no result."""
    copy = tmp_path / "final"
    shutil.copytree(result.run_dir, copy)
    content = json.loads((copy / "search.json").read_text())
    del content["result"], content["sessions"]
    (copy / "search.json").write_text(json.dumps(content))
    first, *_ = (copy / "finalists.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "finalists.jsonl").write_bytes(first + b'{"number": 6, "sta')
    for name in ("evaluation.json", "out_of_fold.parquet"):
        (copy / name).unlink()
    for name in ("best", "ensemble"):
        shutil.rmtree(copy / name)
    done = json.loads(first)["number"]
    for path in (copy / "trials").glob("0000*-*.eqx"):
        if not path.name.startswith(f"{done:05d}-fold"):
            path.unlink()
    resumed = resume_search(copy)
    assert resumed.evaluation == result.evaluation
    assert resumed.winner == result.winner
    leaves = [
        path.read_bytes().split(b"\n", 1)[1] for path in (resumed.checkpoint, result.checkpoint)
    ]
    assert leaves[0] == leaves[1]


def test_trials_of_folds_end_with_a_final_fit(ray_instance: Any, tmp_path: Path) -> None:
    given = ("evaluation.folds=3", "evaluation.finalists=0", "search.trials=2")
    spec = load_spec("quick", (*OVERRIDES, *given))
    result = run_search(spec, runs=tmp_path, name="folds")
    assert {record.members for record in result.records} == {3}
    assert len(search_of(result)["folds"]) == 3
    assert result.evaluation["validated_on"] == "folds"
    assert read_header(result.checkpoint)["search"]["final_fit"] is True
    assert not checkpoint_path(result.run_dir / "trials", 0).exists()
    # Once more on the same folds with the same seed: the search's own figures.
    for each in result.evaluation["finalists"]:
        record = result.records[each["trial"]]
        if record.state == "COMPLETE":
            assert each["objective"] == pytest.approx(record.objective, abs=1e-4)


# --- what a search never sees --------------------------------------------------------------------


def test_test_rows_of_nan_change_nothing(tmp_path: Path) -> None:
    """From the search's trials to the final fit, with test rows that nothing could digest."""
    outcomes = []
    for name, poisoned in (("clean", False), ("poisoned", True)):
        table = load_features()
        split = make_split(table.frame)
        frame = table.frame.copy()
        if poisoned:
            columns = [frame.columns.get_loc(column) for column in (*FEATURES, *TARGETS)]
            frame.iloc[split.test, columns] = np.nan
        rows = FeatureTable(frame, table.provenance)
        spec = load_spec("quick", (*OVERRIDES, "training.epochs=3", "evaluation.finalists=2"))
        run = SearchRun(RunFolder.create(tmp_path, name, exact=True), spec, rows, split)
        write_run(run)
        finalists = fixed_finalists(run, [record(0, 0.3, width=8), record(1, 0.2, width=16)])
        backend = LocalBackend(finalist_arrays(run), spec.training, run.folder.trials)
        for each in finalists:
            members = finalist_members(spec)
            trial = Assignment(each.number, each.configuration, 0, members, keep_members=True)
            result = {**backend.advance(trial, 3).as_result(), "members": len(members)}
            Ledger(run.folder.finalists).append(
                finish(
                    number=each.number,
                    configuration=each.configuration,
                    result={**result, "seconds": 0.0},
                    max_epochs=3,
                )
            )
        final = conclude_finalists(run)
        fit = FinalFit(final.winner.configuration, 2, 0, {}, 0.0, {})
        path = write_final_fit(run, fit, tmp_path / f"{name}.eqx")
        assert np.isfinite(rows.arrays(fitted_rows(run))[0]).all()
        outcomes.append((final.standings, path.read_bytes().split(b"\n", 1)[1]))
    assert outcomes[0] == outcomes[1]


# --- who is a finalist ---------------------------------------------------------------------------


def record(
    number: int, objective: float | None, *, epochs: int = 400, **changes: Any
) -> TrialRecord:
    configuration = {**default_configuration(), "learning_rate": 1e-3, **changes}
    result = {"epochs": epochs, "objective": objective, "best_epoch": 1, "rmse": {"V": 0.2}}
    return finish(
        number=number, configuration=configuration, result=result, max_epochs=400, started=0.0
    )


def chosen(records: list[TrialRecord], count: int = 3) -> list[int | None]:
    spec = load_spec("quick", [f"evaluation.finalists={count}", "search.trials=10"])
    finalists = choose_finalists(spec, records)
    assert [each.number for each in finalists] == list(range(10, 10 + len(finalists)))
    return [each.trial for each in finalists]


def test_the_best_complete_trials_and_the_default_are_finalists() -> None:
    default = record(0, 0.9, learning_rate=1e-4)
    better = [record(1, 0.3, width=8), record(2, 0.2, width=16), record(3, 0.25, width=32)]
    assert chosen([default, *better]) == [2, 3, 0]
    assert chosen(better) == [2, 3, None]
    assert chosen([default, better[0]], count=8) == [1, 0]


def test_a_default_that_breaks_a_constraint_is_no_finalist() -> None:
    spec = load_spec("quick", ["search.max_parameters=5000", "evaluation.finalists=3"])
    trials = [record(1, 0.3, width=8), record(2, 0.2, width=16)]
    assert [each.trial for each in choose_finalists(spec, trials)] == [2, 1]


def test_too_few_nights_for_the_folds_are_said_before_the_search(tmp_path: Path) -> None:
    table = pd.read_csv(Path(desisky_tune.__file__).parent / "data/sample/desi-sv1-exposures.csv")
    moonlit = table.query("MOONALT > 5 and MOONFRAC > 0.5 and SUNALT < -20")
    nights = moonlit["NIGHT"].value_counts().index[:5]
    moonlit[moonlit["NIGHT"].isin(nights)].to_csv(tmp_path / "five.csv", index=False)
    spec = load_spec("quick", [f"data.source={tmp_path / 'five.csv'}"])
    with pytest.raises(DataError, match=r"evaluation\.finalist_folds: 5 folds by NIGHT need"):
        run_search(spec, runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_configuration_comes_once_and_a_failed_one_never() -> None:
    twice = [record(1, 0.3, width=8), record(2, 0.2, width=8), record(3, None, width=16)]
    assert chosen(twice) == [2, None]


def test_pruned_trials_fill_up_by_how_far_they_got() -> None:
    records = [
        record(1, 0.3, width=8),
        record(2, 0.1, width=16, epochs=25),
        record(3, 0.28, width=32, epochs=225),
        record(4, 0.27, width=64, epochs=225),
    ]
    assert chosen(records, count=4) == [1, 4, 3, None]


def test_a_trial_that_ended_early_is_no_worse_for_it() -> None:
    early = replace(record(2, 0.1, width=16, epochs=25), state="COMPLETE")
    assert chosen([record(1, 0.3, width=8), early, record(3, 0.2, width=32)]) == [2, 3, None]


def test_a_finalist_that_is_the_default_but_for_what_is_off_is_the_default() -> None:
    off = record(4, 0.5, learning_rate=1e-4, weight_decay=0.0, early_stopping=0)
    assert chosen([record(1, 0.3, width=8), off]) == [1, 4]


def test_one_finalist_is_none() -> None:
    with pytest.raises(InputError, match=r"evaluation\.finalists.*at least 2"):
        load_spec("quick", ["evaluation.finalists=1"])
