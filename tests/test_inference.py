"""Predictions by column name, and how good they are beside the baselines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from desisky_tune.data.columns import BANDS, FEATURES, TARGETS
from desisky_tune.data.features import FeatureTable
from desisky_tune.data.splits import make_split
from desisky_tune.errors import CheckpointError, DataError, MissingFileError
from desisky_tune.inference import (
    PREDICTIONS,
    Figures,
    Predictor,
    apply_model,
    evaluate,
    predict_frame,
    recorded_split,
)
from desisky_tune.io import checkpoint_meta, save
from desisky_tune.models import make_broadbandMLP, permute_inputs

#: Low and high of each feature over the moonlit exposures, in the order of FEATURES.
RANGES = ((31, 90), (31, 90), (5, 84), (0.5, 1), (0.06, 1.2), (0, 1))


def exposures(rows: int = 60, seed: int = 0) -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    columns: dict[str, Any] = {
        "EXPID": np.arange(1000, 1000 + rows),
        "NIGHT": 20210100 + np.arange(rows) // 10 + 1,
    }
    for name, (low, high) in zip(FEATURES, RANGES, strict=True):
        columns[name] = draw.uniform(low, high, rows)
    for name in TARGETS:
        columns[name] = draw.uniform(18, 21, rows)
    return pd.DataFrame(columns)


def feature_table(rows: int = 60, *, v_derived: bool = False) -> FeatureTable:
    return FeatureTable(exposures(rows), {"v_derived": v_derived, "fingerprint": "f" * 64})


def small_model(seed: int = 0) -> eqx.nn.MLP:
    return make_broadbandMLP(
        in_size=6, out_size=4, width_size=8, depth=1, key=jax.random.PRNGKey(seed)
    )


def saved(path: Path, model: eqx.nn.MLP, features: Any = FEATURES, **keys: Any) -> Path:
    return save(path, model, checkpoint_meta(model, features=features, **keys))


def by_hand(model: eqx.nn.MLP, inputs: np.ndarray) -> np.ndarray:
    """The MLP in NumPy and float64."""
    hidden = inputs.astype(float)
    for layer in model.layers[:-1]:
        hidden = np.maximum(hidden @ np.asarray(layer.weight, float).T + np.asarray(layer.bias), 0)
    last = model.layers[-1]
    return hidden @ np.asarray(last.weight, float).T + np.asarray(last.bias)


# --- predictions ----------------------------------------------------------------------------------


def test_predictions_are_the_networks(tmp_path: Path) -> None:
    frame, model = exposures(), small_model()
    result = predict_frame(saved(tmp_path / "x.eqx", model), frame)
    np.testing.assert_allclose(
        result[list(PREDICTIONS)], by_hand(model, frame[list(FEATURES)].to_numpy()), atol=1e-4
    )
    pd.testing.assert_frame_equal(result[frame.columns], frame)
    assert result.attrs["notes"] == []


def test_columns_are_named_after_the_observed_ones() -> None:
    assert PREDICTIONS == ("SKY_MAG_V_PRED", "SKY_MAG_G_PRED", "SKY_MAG_R_PRED", "SKY_MAG_Z_PRED")


@settings(max_examples=10, deadline=None)
@given(written=st.permutations(FEATURES), shown=st.permutations(FEATURES))
def test_no_order_of_features_or_columns_changes_a_prediction(
    tmp_path_factory: pytest.TempPathFactory, written: list[str], shown: list[str]
) -> None:
    frame, model = exposures(20), small_model()
    path = saved(
        tmp_path_factory.mktemp("order") / "x.eqx",
        permute_inputs(model, FEATURES, written),
        written,
    )
    result = predict_frame(path, frame[["NIGHT", *shown]])
    np.testing.assert_allclose(
        result[list(PREDICTIONS)], by_hand(model, frame[list(FEATURES)].to_numpy()), atol=1e-4
    )


def test_many_rows_go_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, model = exposures(25)[list(FEATURES)].to_numpy(), small_model()
    monkeypatch.setattr("desisky_tune.inference.predictor._ROWS_AT_A_TIME", 10)
    np.testing.assert_allclose(apply_model(model, inputs), by_hand(model, inputs), atol=1e-4)
    assert apply_model(model, inputs[:0]).shape == (0, 4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"depth": 0},
        {"activation": jax.nn.tanh},
        {"final_activation": jax.nn.softplus},
        {"use_bias": False},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_any_model_is_applied_as_it_applies_itself(options: dict[str, Any]) -> None:
    sizes = {"in_size": 6, "out_size": 4, "width_size": 16, "depth": 2} | options
    model = eqx.nn.MLP(**sizes, key=jax.random.PRNGKey(3))
    inputs = np.random.default_rng(0).normal(size=(7, 6)).astype(np.float32)
    expected = [np.asarray(model(row), float) for row in inputs]
    np.testing.assert_allclose(apply_model(model, inputs), expected, atol=1e-5)


def test_row_without_a_feature_gets_no_prediction_and_is_counted(tmp_path: Path) -> None:
    frame = exposures(10)
    frame.loc[3, "MOONSEP"] = np.nan
    frame.loc[7, "TRANSPARENCY_GFA"] = np.inf
    result = predict_frame(saved(tmp_path / "x.eqx", small_model()), frame)
    missing = result[list(PREDICTIONS)].isna().all(axis=1)
    assert missing[missing].index.tolist() == [3, 7]
    assert result.attrs["notes"] == ["2 of 10 rows lack a feature: no prediction (NaN)"]


def test_conditions_that_the_model_has_not_seen_are_counted(tmp_path: Path) -> None:
    frame = exposures(10)
    frame["SUNALT"], frame["MOONALT"], frame["MOONSEP"] = -40.0, 30.0, 60.0
    frame["MOONFRAC"], frame["OBSALT"] = 0.8, 50.0
    path = saved(tmp_path / "x.eqx", small_model(), data={"subset": "moon"})
    assert predict_frame(path, frame).attrs["notes"] == []
    frame.loc[2, "OBSALT"] = -0.5
    frame.loc[4, "SUNALT"] = 10.0
    frame.loc[[4, 6], "MOONALT"] = -20.0
    frame.loc[8, ["MOONALT", "TRANSPARENCY_GFA"]] = [-20.0, np.nan]  # no prediction at all
    lacks, below, outside = predict_frame(path, frame).attrs["notes"]
    assert lacks.startswith("1 of 10 rows lack a feature")
    assert below.startswith("1 of 10 rows have their field below the horizon")
    assert outside.startswith("2 of 10 rows are not of the subset moon")
    assert "SUNALT < -20, MOONALT > 5" in outside


def test_missing_column_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    frame = exposures(5).rename(columns={"MOONSEP": "MOON_SEP"})
    with pytest.raises(DataError, match=r"MOONSEP .*MOON_SEP"):
        predict_frame(saved(tmp_path / "x.eqx", small_model()), frame)


def test_words_are_no_feature(tmp_path: Path) -> None:
    frame = exposures(5).astype({"MOONSEP": object})
    frame.loc[2, "MOONSEP"] = "wide"
    with pytest.raises(DataError, match="MOONSEP holds something that is no number"):
        predict_frame(saved(tmp_path / "x.eqx", small_model()), frame)


def test_checkpoint_that_cannot_serve_is_refused(tmp_path: Path) -> None:
    three = make_broadbandMLP(in_size=6, out_size=3, width_size=8, depth=1)
    path = save(tmp_path / "three.eqx", three, checkpoint_meta(three, features=FEATURES))
    with pytest.raises(CheckpointError, match="gives 3 values; V, g, r, z are needed"):
        predict_frame(path, exposures(5))
    five = make_broadbandMLP(in_size=5, out_size=4, width_size=8, depth=1)
    path = save(tmp_path / "five.eqx", five, checkpoint_meta(five, features=None))
    with pytest.raises(CheckpointError, match="records no feature names and takes 5 inputs"):
        predict_frame(path, exposures(5))
    with pytest.raises(MissingFileError, match=r"nowhere\.eqx"):
        predict_frame(tmp_path / "nowhere.eqx", exposures(5))


def test_order_that_had_to_be_assumed_is_said(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.eqx", small_model(), features=None)
    (note,) = predict_frame(path, exposures(5)).attrs["notes"]
    assert "reference order: " + ", ".join(FEATURES) in note


@pytest.mark.parametrize("with_mean", [True, False])
def test_constant_feature_that_varies_here_is_said(tmp_path: Path, with_mean: bool) -> None:
    scaling: dict[str, Any] = {"constant": [False] * 5 + [True]}
    if with_mean:
        scaling["input_mean"] = [50.0, 60.0, 40.0, 0.8, 1.0, 0.0]
    path = saved(tmp_path / "x.eqx", small_model(), scaling=scaling)
    frame = exposures(8).assign(ECLIPSE_FRAC=0.0)
    assert predict_frame(path, frame).attrs["notes"] == []
    frame.loc[[1, 4], "ECLIPSE_FRAC"] = 0.5
    (note,) = predict_frame(path, frame).attrs["notes"]
    assert "ECLIPSE_FRAC did not vary in training" in note
    assert "2 of 8 rows have another value" in note
    assert ("always 0" in note) == with_mean


# --- evaluations ----------------------------------------------------------------------------------


def shifted(table: FeatureTable, offsets: list[float]) -> Any:
    """A model that knows every exposure of the table and is off by an offset per band."""
    known = jnp.asarray(table.frame[list(FEATURES)].to_numpy(np.float32))
    answers = jnp.asarray(table.frame[list(TARGETS)].to_numpy(np.float32) + np.array(offsets))

    def model(x: jax.Array) -> jax.Array:
        return answers[jnp.argmin(jnp.sum((known - x) ** 2, axis=1))]

    return model


def test_figures_of_a_model_off_by_a_known_amount() -> None:
    table = feature_table()
    evaluation = evaluate(shifted(table, [0.5, -0.3, 0.0, 0.1]), table, train_rows=np.arange(30))
    figures = evaluation.figures["checkpoint"]
    for band, offset in zip(BANDS, (0.5, -0.3, 0.0, 0.1), strict=True):
        values = figures.bands[band]
        assert values["rmse"] == pytest.approx(abs(offset), abs=1e-5)
        assert values["bias"] == pytest.approx(offset, abs=1e-5)
        assert values["nmad"] == pytest.approx(0, abs=1e-5)
        assert values["outlier_fraction"] == (1 if abs(offset) > 0.4 else 0)
        assert values["n"] == 60
    assert figures.mean == pytest.approx((0.5 + 0.3 + 0 + 0.1) / 4, abs=1e-5)
    assert figures.mean_grz == pytest.approx((0.3 + 0 + 0.1) / 3, abs=1e-5)


def test_constant_is_the_training_rows_mean() -> None:
    table = feature_table()
    train, rows = np.arange(30), np.arange(30, 60)
    evaluation = evaluate(small_model(), table, rows, train_rows=train)
    magnitudes = table.frame[list(TARGETS)].to_numpy()
    residual = magnitudes[train].mean(axis=0) - magnitudes[rows]
    for column, band in enumerate(BANDS):
        values = evaluation.figures["constant"].bands[band]
        assert values["bias"] == pytest.approx(residual[:, column].mean())
        assert values["rmse"] == pytest.approx(np.sqrt((residual[:, column] ** 2).mean()))
    assert set(evaluation.figures) == {"checkpoint", "classical", "constant"}
    assert evaluation.notes == ()


def test_squared_errors_of_the_nights_add_up() -> None:
    evaluation = evaluate(small_model(), feature_table(), train_rows=np.arange(30))
    assert list(evaluation.by_night) == [20210101, 20210102, 20210103, 20210104, 20210105, 20210106]
    for name, figures in evaluation.figures.items():
        for band in BANDS:
            nights = [models[name].bands[band] for models in evaluation.by_night.values()]
            pooled = sum(night["n"] * night["rmse"] ** 2 for night in nights)
            assert figures.bands[band]["n"] == sum(night["n"] for night in nights)
            assert figures.bands[band]["n"] * figures.bands[band]["rmse"] ** 2 == pytest.approx(
                pooled
            )


def test_training_rows_among_the_measured_ones_are_said() -> None:
    evaluation = evaluate(small_model(), feature_table(), np.arange(20, 60), train_rows=range(25))
    assert "5 of 40 rows measured on are training rows" in evaluation.notes


def test_without_training_rows_the_model_stands_alone() -> None:
    evaluation = evaluate(small_model(), feature_table())
    assert list(evaluation.figures) == ["checkpoint"]
    assert any("training rows are not known" in note for note in evaluation.notes)


@pytest.mark.parametrize("record", ["exposures", "draw"])
def test_training_rows_come_from_the_header(tmp_path: Path, record: str) -> None:
    table = feature_table()
    split = make_split(table.frame, seed=4)
    described = split.as_exposures(table.frame)
    if record == "draw":
        described = {key: described[key] for key in ("by", "seed", "fractions")}
    data = {"fingerprint": table.fingerprint}
    path = saved(tmp_path / "x.eqx", small_model(), split=described, data=data)
    given_rows = evaluate(path, table, split.test, train_rows=split.train)
    assert evaluate(path, table, split.test).as_dict() == given_rows.as_dict()


@pytest.mark.parametrize("record", ["exposures", "draw"])
def test_rows_of_a_final_fit_are_no_validation_rows(tmp_path: Path, record: str) -> None:
    table = feature_table()
    split = make_split(table.frame, seed=4)
    fitted = np.sort(np.concatenate([split.train, split.validation]))
    described = split.as_exposures(table.frame)
    if record == "draw":
        drawn = {key: described[key] for key in ("by", "seed", "fractions")}
        described = {**drawn, "fitted": ["train", "validation"]}
    else:
        exposures = table.frame["EXPID"].to_numpy()[fitted]
        described = {**described, "train": exposures.tolist(), "validation": []}
    data = {"fingerprint": table.fingerprint}
    found = recorded_split({"split": described, "data": data}, table)
    assert found is not None
    np.testing.assert_array_equal(found.train, fitted)
    assert not len(found.validation)
    path = saved(tmp_path / "x.eqx", small_model(), split=described, data=data)
    evaluation = evaluate(path, table, split.validation, train_rows=split.train)
    count = len(split.validation)
    assert f"{count} of {count} rows measured on are training rows" in evaluation.notes


def test_split_of_another_table_is_none_of_ours() -> None:
    table = feature_table()
    drawn = {"by": "NIGHT", "seed": 0, "fractions": [0.6, 0.2, 0.2]}
    of_another = {"by": "NIGHT", "seed": 0, "fractions": [1, 0, 0], "train": [1]}
    for meta in (
        {},
        {"split": None},
        {"split": drawn},
        {"split": drawn, "data": {"fingerprint": "0" * 64}},
        {"split": {}, "data": {"fingerprint": table.fingerprint}},
        {"split": {**of_another, "validation": [], "test": []}},
    ):
        assert recorded_split(meta, table) is None


def test_derived_v_is_marked_wherever_it_is_shown() -> None:
    evaluation = evaluate(small_model(), feature_table(v_derived=True), train_rows=np.arange(30))
    assert evaluation.as_dict()["v_derived"] is True
    assert any("V is derived" in note for note in evaluation.notes)
    bands = [row["band"] for row in evaluation.table_rows()]
    assert bands[:6] == ["V (derived)", "g", "r", "z", "V g r z", "g r z"]


def test_evaluation_is_json_and_rows_of_tables() -> None:
    evaluation = evaluate(small_model(), feature_table(), train_rows=np.arange(30))
    written = json.loads(json.dumps(evaluation.as_dict(), allow_nan=False))
    assert written["figures"]["classical"]["mean"] == evaluation.figures["classical"].mean
    assert [night["rows"] for night in written["by_night"]] == [10] * 6
    rows = evaluation.night_rows()
    assert rows[0]["night"] == 20210101
    assert set(rows[0]) == {"night", "rows", "checkpoint", "classical", "constant"}
    assert len(evaluation.table_rows()) == 3 * 6


def test_means_of_figures_follow_the_bands() -> None:
    bands = dict(zip(BANDS, ({"rmse": value} for value in (1.0, 2.0, 3.0, 6.0)), strict=True))
    assert Figures(bands).mean == 3.0
    assert Figures(bands).mean_grz == pytest.approx(11 / 3)


def test_no_rows_are_refused() -> None:
    with pytest.raises(DataError, match="no row to evaluate on"):
        evaluate(small_model(), feature_table(), [])


def test_model_from_memory_takes_the_reference_order_or_the_names_given() -> None:
    assert Predictor(small_model()).features == FEATURES
    with pytest.raises(DataError, match="HUMIDITY"):
        evaluate(small_model(), feature_table(), features=["HUMIDITY", *FEATURES[1:]])
    with pytest.raises(CheckpointError, match="OBSALT is named twice"):
        evaluate(small_model(), feature_table(), features=["OBSALT", *FEATURES[1:]])


def test_importing_it_imports_no_jax_and_no_pandas() -> None:
    code = (
        "import sys; import desisky_tune.inference, desisky_tune.io, desisky_tune.models;"
        "import desisky_tune.visualization;"
        "print([m for m in ('jax', 'ray', 'pandas', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
