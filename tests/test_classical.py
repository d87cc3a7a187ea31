"""Krisciunas & Schaefer by hand, and the models fitted on top of it."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from desisky_tune.errors import DataError
from desisky_tune.models.classical import (
    ClassicalModel,
    ConstantModel,
    krisciunas_schaefer_v,
    magnitude_of_nanolamberts,
    moon_magnitude,
    moonlight_nanolamberts,
)


def by_hand(phase: float, rho: float, z_moon: float, z: float, k: float = 0.162) -> float:
    """Equations 1, 3, 8, 9, 15 and 21 of the paper, in plain arithmetic; deg."""
    m = -12.73 + 0.026 * abs(phase) + 4e-9 * phase**4
    illuminance = 10 ** (-0.4 * (m + 16.57))
    f = 10**5.36 * (1.06 + math.cos(math.radians(rho)) ** 2) + 10 ** (6.15 - rho / 40)
    x_moon = 1 / math.sqrt(1 - 0.96 * math.sin(math.radians(z_moon)) ** 2)
    x = 1 / math.sqrt(1 - 0.96 * math.sin(math.radians(z)) ** 2)
    b = f * illuminance * 10 ** (-0.4 * k * x_moon) * (1 - 10 ** (-0.4 * k * x))
    return (20.7233 - math.log(b / 34.08)) / 0.92104


def conditions(rows: int = 200, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "MOONFRAC": rng.uniform(0.5, 1.0, rows),
        "MOONSEP": rng.uniform(31, 90, rows),
        "MOONALT": rng.uniform(5, 80, rows),
        "OBSALT": rng.uniform(31, 90, rows),
        "TRANSPARENCY_GFA": rng.uniform(0.5, 1.05, rows),
        "ECLIPSE_FRAC": np.zeros(rows),
    }


def true_bands(
    features: dict[str, np.ndarray],
    colour: tuple[float, ...],
    dark: tuple[float, ...],
    cloud: tuple[float, ...],
) -> np.ndarray:
    """What the model should be, row by row and without its code."""
    bands = np.empty((len(features["MOONFRAC"]), 4))
    for row in range(len(bands)):
        phase = math.degrees(math.acos(2 * features["MOONFRAC"][row] - 1))
        v = by_hand(
            phase,
            features["MOONSEP"][row],
            90 - features["MOONALT"][row],
            90 - features["OBSALT"][row],
        )
        dimming = -2.5 * math.log10(features["TRANSPARENCY_GFA"][row])
        for band in range(4):
            moon = 10 ** (-0.4 * (v + colour[band] + cloud[band] * dimming))
            bands[row, band] = -2.5 * math.log10(moon + 10 ** (-0.4 * dark[band]))
    return bands


@settings(max_examples=30, deadline=None)
@given(
    phase=st.floats(0, 120),
    rho=st.floats(5, 120),
    z_moon=st.floats(0, 85),
    z=st.floats(0, 70),
)
def test_v_is_the_papers(phase: float, rho: float, z_moon: float, z: float) -> None:
    fraction = (1 + math.cos(math.radians(phase))) / 2
    v = float(krisciunas_schaefer_v(fraction, rho, 90 - z_moon, 90 - z))
    assert v == pytest.approx(by_hand(phase, rho, z_moon, z), abs=1e-5)


def test_numbers_worked_out_by_hand() -> None:
    # Full Moon: m = -12.73, I* = 10^(-0.4 * 3.84) = 0.0291.
    assert float(moon_magnitude(0.0)) == -12.73
    # Half Moon: -12.73 + 2.34 + 0.26244.
    assert float(moon_magnitude(90.0)) == pytest.approx(-10.12756, abs=1e-9)
    # rho = 90 at the zenith, Moon at Z = 90 where X = 1 / sqrt(0.04) = 5:
    # f = 229086.8 * 1.06 + 10^3.9 = 250775.3; I* = 0.029107;
    # 10^(-0.4*0.162*5) = 0.474242; 1 - 10^(-0.0648) = 0.138606; product = 479.82 nL.
    b = float(moonlight_nanolamberts(1.0, 90.0, 1e-9, 90.0))
    assert b == pytest.approx(479.8, rel=1e-3)
    # Eq. 1 turned around: at 34.08 nL the logarithm is 0, and V = 22.5.
    assert float(magnitude_of_nanolamberts(34.08)) == pytest.approx(20.7233 / 0.92104)


def test_a_moon_below_the_horizon_gives_no_light() -> None:
    assert float(moonlight_nanolamberts(1.0, 60.0, -5.0, 60.0)) == 0.0
    assert float(krisciunas_schaefer_v(1.0, 60.0, -5.0, 60.0)) == math.inf


def test_without_extinction_nothing_is_scattered() -> None:
    assert float(moonlight_nanolamberts(1.0, 60.0, 40.0, 60.0, k=0.0)) == 0.0


COLOUR, DARK, CLOUD = (0.1, -0.2, 0.15, 0.5), (21.5, 22.1, 21.2, 19.4), (-1.5, -0.9, -2.0, -2.5)


def test_the_fit_recovers_what_made_the_data() -> None:
    features = conditions()
    targets = true_bands(features, COLOUR, DARK, CLOUD)
    model = ClassicalModel.fit(features, targets)
    np.testing.assert_allclose(model.colour, COLOUR, atol=0.01)
    np.testing.assert_allclose(model.dark, DARK, atol=0.05)
    np.testing.assert_allclose(model.cloud, CLOUD, atol=0.02)
    np.testing.assert_allclose(model.predict(features), targets, atol=0.01)


def test_a_few_absurd_magnitudes_do_not_bend_the_fit() -> None:
    features = conditions()
    targets = true_bands(features, COLOUR, DARK, CLOUD)
    broken = targets.copy()
    broken[::40] += 8.0
    broken[5, 2] = np.nan
    model = ClassicalModel.fit(features, broken)
    np.testing.assert_allclose(np.median(model.predict(features) - targets, axis=0), 0, atol=0.03)


def test_frames_in_any_order_of_rows_and_columns() -> None:
    features = conditions()
    frame = pd.DataFrame(features)
    targets = true_bands(features, COLOUR, DARK, CLOUD)
    model = ClassicalModel.fit(frame, targets)
    shuffled = frame.sample(frac=1, random_state=0)[sorted(frame.columns, reverse=True)]
    np.testing.assert_allclose(
        model.predict(shuffled), model.predict(frame)[shuffled.index], rtol=1e-12
    )


def test_predictions_are_finite_whatever_the_moon_and_the_clouds() -> None:
    features = conditions()
    model = ClassicalModel.fit(features, true_bands(features, COLOUR, DARK, CLOUD))
    features["MOONALT"][:50] = -30.0
    features["MOONALT"][50] = 0.0
    features["TRANSPARENCY_GFA"][60:63] = [np.nan, 0.0, -1.0]
    features["ECLIPSE_FRAC"][70] = 1.0
    predicted = model.predict(features)
    assert np.isfinite(predicted).all()
    dark_rows = [*range(51), 70]
    np.testing.assert_allclose(predicted[dark_rows], np.tile(model.dark, (52, 1)), rtol=1e-12)


def test_an_unusable_transparency_counts_as_clear() -> None:
    features = conditions()
    model = ClassicalModel.fit(features, true_bands(features, COLOUR, DARK, CLOUD))
    clear = {**features, "TRANSPARENCY_GFA": np.ones(200)}
    unknown = {**features, "TRANSPARENCY_GFA": np.full(200, np.nan)}
    without = {name: features[name] for name in ("MOONFRAC", "MOONSEP", "MOONALT", "OBSALT")}
    np.testing.assert_array_equal(model.predict(unknown), model.predict(clear))
    np.testing.assert_array_equal(model.predict(without), model.predict(clear))


def test_a_fit_to_dark_rows_alone_gives_their_level() -> None:
    features = conditions(50)
    features["MOONALT"][:] = -20.0
    targets = np.tile(DARK, (50, 1))
    model = ClassicalModel.fit(features, targets)
    np.testing.assert_allclose(model.predict(features), targets, atol=1e-3)


def test_both_models_survive_json() -> None:
    features = conditions()
    targets = true_bands(features, COLOUR, DARK, CLOUD)
    for model in (ClassicalModel.fit(features, targets), ConstantModel.fit(features, targets)):
        again = type(model).from_dict(json.loads(json.dumps(model.as_dict())))
        assert again == model
        np.testing.assert_array_equal(again.predict(features), model.predict(features))


def test_a_constant_is_the_mean_of_each_band() -> None:
    targets = np.array([[20.0, 21.0, 19.0, 18.0], [22.0, np.nan, 20.0, 19.0]])
    model = ConstantModel.fit(None, targets)
    assert model.level == (21.0, 21.0, 19.5, 18.5)
    frame = pd.DataFrame({"MOONSEP": [1.0, 2.0, 3.0]})
    np.testing.assert_array_equal(model.predict(frame), np.tile(model.level, (3, 1)))
    assert model.predict({"MOONSEP": np.zeros(2)}).shape == (2, 4)


def test_wrong_input_is_named() -> None:
    features = conditions(10)
    targets = np.full((10, 4), 20.0)
    with pytest.raises(DataError, match="column MOONSEP is missing"):
        ClassicalModel.fit({k: v for k, v in features.items() if k != "MOONSEP"}, targets)
    with pytest.raises(DataError, match=r"shape \(9, 4\): \(10, 4\)"):
        ClassicalModel.fit(features, targets[:9])
    with pytest.raises(DataError, match="band V has 0 usable rows"):
        ClassicalModel.fit(features, np.full((10, 4), np.nan))
    with pytest.raises(DataError, match="band g has no finite magnitude"):
        ConstantModel.fit(None, np.array([[20.0, np.nan, 20.0, 20.0]]))
