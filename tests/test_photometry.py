"""Magnitudes against speclite, and against the AB system's definition."""

from __future__ import annotations

import numpy as np
import pytest
from speclite.filters import load_filter

from desisky_tune.data.columns import BANDS
from desisky_tune.data.photometry import FILTERS, band_weights, derived_v, magnitudes
from desisky_tune.data.simulate import Sky, Weather, vac_wavelength
from desisky_tune.errors import DataError


@pytest.fixture(scope="module")
def spectra() -> np.ndarray:
    """Sky spectra from dark to full Moon, clear to cloudy; the last pixel 0 as in the VAC."""
    rng = np.random.default_rng(3)
    n = 24
    columns = {
        "MOONFRAC": rng.uniform(0.5, 1, n),
        "MOONALT": rng.uniform(-40, 80, n),
        "MOONSEP": rng.uniform(31, 90, n),
        "OBSALT": rng.uniform(31, 90, n),
        "SUNALT": rng.uniform(-60, -12, n),
        "MOONDIST": rng.uniform(3.6e5, 4.0e5, n),
    }
    weather = Weather(
        transparency=rng.uniform(0.1, 1.1, n),
        aerosol_depth=rng.uniform(0.02, 0.15, n),
        continuum=rng.uniform(0.8, 1.2, n),
        lines=rng.uniform(0.6, 1.6, n),
    )
    flux = Sky(vac_wavelength()).spectra(columns, weather, np.zeros(n))
    flux[:, -1] = 0.0
    return flux.astype(np.float32)


def test_magnitudes_equal_those_of_speclite(spectra: np.ndarray) -> None:
    wavelength = vac_wavelength()
    ours = magnitudes(spectra, wavelength)
    for column, band in enumerate(BANDS):
        curve = load_filter(FILTERS[band])
        for row, flux in enumerate(spectra.astype(np.float64)):
            padded, grid = curve.pad_spectrum(flux * 1e-17, wavelength, method="zero")
            theirs = curve.get_ab_magnitude(padded, grid)
            assert ours[row, column] == pytest.approx(theirs, abs=1e-5), (band, row)


def test_a_flat_ab_spectrum_of_3631_jy_has_magnitude_zero() -> None:
    # f_nu = 3.63e-20 erg/s/cm2/Hz (48.60 exactly); f_lambda = f_nu c / lambda^2.
    wavelength = np.arange(3000.0, 11200.0, 1.0)
    f_lambda = 10 ** (-0.4 * 48.60) * 2.99792458e18 / wavelength**2
    np.testing.assert_allclose(magnitudes(f_lambda * 1e17, wavelength), 0.0, atol=2e-4)


def test_ten_times_the_flux_is_two_and_a_half_magnitudes_brighter(spectra: np.ndarray) -> None:
    wavelength = vac_wavelength()
    brighter = magnitudes(10 * spectra.astype(np.float64), wavelength)
    np.testing.assert_allclose(magnitudes(spectra, wavelength) - brighter, 2.5, atol=1e-12)


def test_many_rows_big_endian_and_single_rows_agree(spectra: np.ndarray) -> None:
    wavelength = vac_wavelength()
    many = np.resize(spectra, (1100, spectra.shape[1])).astype(">f4")
    expected = np.concatenate([magnitudes(row, wavelength) for row in spectra])
    np.testing.assert_allclose(
        magnitudes(many, wavelength), np.resize(expected, (1100, 4)), atol=1e-10
    )


def test_bands_come_in_the_order_asked_for(spectra: np.ndarray) -> None:
    wavelength = vac_wavelength()
    everything = magnitudes(spectra, wavelength)
    np.testing.assert_allclose(
        magnitudes(spectra, wavelength, ("z", "V")), everything[:, [3, 0]], atol=1e-10
    )


def test_flux_that_is_not_positive_has_no_magnitude(spectra: np.ndarray) -> None:
    broken = spectra[:3].copy()
    broken[0] = 0.0
    broken[1] *= -1.0
    broken[2, 3000] = np.nan
    assert np.isnan(magnitudes(broken, vac_wavelength())[:2]).all()
    assert np.isnan(magnitudes(broken, vac_wavelength())[2]).all()


def test_weights_are_computed_once_per_grid() -> None:
    wavelength = vac_wavelength()
    assert band_weights(wavelength) is band_weights(wavelength.copy())
    with pytest.raises(ValueError, match="read-only"):
        band_weights(wavelength)[0, 0] = 1.0


def test_v_from_g_and_r_is_close_to_v_of_a_moonlit_spectrum(spectra: np.ndarray) -> None:
    v, g, r, _ = magnitudes(spectra, vac_wavelength()).T
    moonlit = v < 20  # the formula was fitted to moonlit spectra
    assert moonlit.sum() > 5
    difference = (v - derived_v(g, r))[moonlit]
    assert np.std(difference) < 0.03
    assert abs(np.mean(difference)) < 0.03
    assert derived_v(20.0, 19.0) == pytest.approx(0.454 * 20 + 0.526 * 19 + 0.40)


def test_wrong_input_is_named() -> None:
    wavelength = vac_wavelength()
    with pytest.raises(DataError, match="unknown band 'i'"):
        magnitudes(np.ones((2, wavelength.size)), wavelength, ("i",))
    with pytest.raises(DataError, match=r"\(2, 5\).*7781"):
        magnitudes(np.ones((2, 5)), wavelength)
    with pytest.raises(DataError, match="strictly increasing"):
        band_weights(wavelength[::-1])
