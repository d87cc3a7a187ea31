"""The samplers: functions of seed, number and history; and the Gaussian process by its formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optuna
import pytest
from scipy.integrate import quad
from scipy.optimize import approx_fprime
from scipy.stats import multivariate_normal, norm

from desisky_tune.search.gaussian_process import (
    GaussianProcess,
    _negative_log_likelihood,
    log_expected_improvement,
    matern,
    next_point,
)
from desisky_tune.search.samplers import make_sampler, sampler_settings, trial_seed
from desisky_tune.search.space import SearchSpec, spec_from_dict

SAMPLERS = ("tpe", "gp", "cmaes", "random", "qmc")
LEARNERS = ("tpe", "gp", "cmaes")


def a_spec(sampler: str, seed: int = 0, space: Mapping[str, Any] | None = None) -> SearchSpec:
    space = space or {
        "width": {"low": 16, "high": 512, "log": True},
        "depth": {"low": 1, "high": 6},
        "learning_rate": {"low": 1e-5, "high": 1e-1, "log": True},
        "batch_size": {"choices": [16, 32, 64]},
    }
    search = {"sampler": sampler, "seed": seed, "startup_trials": 6}
    return spec_from_dict({"space": space, "search": search})


def bowl(configuration: Mapping[str, Any]) -> float:
    return (
        0.1 * (math.log10(configuration["learning_rate"]) + 2.5) ** 2
        + 0.05 * math.log2(configuration["width"] / 100) ** 2
        + 0.02 * (configuration["depth"] - 3) ** 2
    )


def ask(study: optuna.Study, spec: SearchSpec) -> tuple[optuna.Trial, dict[str, Any]]:
    study.sampler = make_sampler(spec, len(study.get_trials(deepcopy=False)))
    trial = study.ask()
    return trial, spec.suggest(trial)


def search(
    spec: SearchSpec, trials: int, value: Callable[[Mapping[str, Any]], float] = bowl
) -> list[dict[str, Any]]:
    study = optuna.create_study(direction="minimize")
    configurations = []
    for _ in range(trials):
        trial, configuration = ask(study, spec)
        study.tell(trial, value(configuration))
        configurations.append(configuration)
    return configurations


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_suggestions_lie_in_the_space_and_differ(sampler: str) -> None:
    spec = a_spec(sampler)
    configurations = search(spec, 20)
    for configuration in configurations:
        assert set(configuration) == set(spec.space)
        assert configuration["huber_delta"] == 0.25
        for name in ("width", "depth", "learning_rate", "batch_size"):
            assert spec.space[name].contains(configuration[name]), (name, configuration)
        assert isinstance(configuration["width"], int)
        assert isinstance(configuration["batch_size"], int)
    assert len({configuration["learning_rate"] for configuration in configurations}) == 20


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_same_seed_same_search_and_other_seed_another(sampler: str) -> None:
    assert search(a_spec(sampler), 12) == search(a_spec(sampler), 12)
    assert search(a_spec(sampler), 3) != search(a_spec(sampler, seed=1), 3)


@pytest.mark.parametrize("sampler", LEARNERS)
def test_a_sampler_that_learns_beats_random_search(sampler: str) -> None:
    def reached(sampler: str) -> float:
        found = [min(map(bowl, search(a_spec(sampler, seed), 30))) for seed in range(4)]
        return float(np.mean(found))

    assert reached(sampler) < 0.6 * reached("random")


@pytest.mark.parametrize("sampler", LEARNERS)
def test_trials_under_way_keep_neighbours_apart(sampler: str) -> None:
    spec = a_spec(sampler)
    study = optuna.create_study(direction="minimize")
    for _ in range(10):
        trial, configuration = ask(study, spec)
        study.tell(trial, bowl(configuration))
    in_flight = [ask(study, spec)[1] for _ in range(4)]
    rates = [configuration["learning_rate"] for configuration in in_flight]
    assert len(set(rates)) == 4


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "space",
    [
        {"width": 64},
        {"width": {"choices": [64]}},
        {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}},
        {"width": {"choices": [16, 64, 256]}, "batch_size": {"choices": [16, 32]}},
    ],
)
def test_small_spaces_are_searched_too(sampler: str, space: dict[str, Any]) -> None:
    spec = a_spec(sampler, space=space)
    for configuration in search(spec, 10):
        assert configuration.keys() == spec.space.keys()


@pytest.mark.parametrize("sampler", LEARNERS)
def test_a_trial_beyond_the_space_informs_the_others(sampler: str) -> None:
    space = {
        "width": {"choices": [16, 32]},
        "depth": {"low": 1, "high": 3},
        "learning_rate": {"low": 1e-3, "high": 1e-1, "log": True},
    }
    spec = a_spec(sampler, space=space)
    study = optuna.create_study(direction="minimize")
    default = {"width": 128, "depth": 5, "learning_rate": 1e-4, "huber_delta": 0.25}
    params, distributions = spec.as_params({**default, "batch_size": 32})
    assert params == {"depth": 5, "learning_rate": 1e-4}
    study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=0.3))
    for _ in range(12):
        trial, configuration = ask(study, spec)
        assert configuration["depth"] <= 3
        assert configuration["learning_rate"] >= 1e-3
        study.tell(trial, bowl(configuration))


def test_sobol_points_fill_a_grid_more_evenly_than_chance() -> None:
    """Of 16 scrambled Sobol points in base 2, each 16th of an axis holds exactly one."""
    space = {"learning_rate": {"low": 0.5, "high": 1.5}, "huber_delta": {"low": 1, "high": 2}}
    spec = a_spec("qmc", space=space)
    rates = sorted(configuration["learning_rate"] for configuration in search(spec, 16))
    assert [int((rate - 0.5) * 16) for rate in rates] == list(range(16))


def test_seeds_of_trials_differ_and_stay() -> None:
    seeds = {trial_seed(seed, number) for seed in range(10) for number in range(100)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert trial_seed(3, 7) == trial_seed(3, 7)


def test_settings_name_what_decides_suggestions() -> None:
    settings = sampler_settings(a_spec("tpe", seed=4))
    assert settings["seed"] == 4
    assert settings["multivariate"] is True
    assert settings["constant_liar"] is True
    assert settings["group"] is False
    assert "multivariate" not in sampler_settings(a_spec("random"))


def test_matern_kernel_matches_its_closed_form() -> None:
    """Rasmussen & Williams eq. 4.17: (1 + sqrt5 r/l + 5 r^2 / 3 l^2) exp(-sqrt5 r/l)."""
    r, length = 0.3, 0.7
    expected = (1 + math.sqrt(5) * r / length + 5 * r**2 / (3 * length**2)) * math.exp(
        -math.sqrt(5) * r / length
    )
    kernel = matern(np.array([[0.1, 0.5]]), np.array([[0.4, 0.5]]), np.array([length, 9.0]))
    assert kernel[0, 0] == pytest.approx(expected, rel=1e-12)


def some_process() -> GaussianProcess:
    rng = np.random.default_rng(1)
    points = rng.random((7, 2))
    values = np.sin(6 * points[:, 0]) + points[:, 1]
    return GaussianProcess(points, values, np.array([0.3, 0.8]), 1.3, 0.02)


def test_likelihood_is_that_of_a_normal_distribution() -> None:
    process = some_process()
    theta = np.log([*process.lengths, process.amplitude, process.noise])
    squares = np.square(process.points[:, None] - process.points[None])
    value, gradient = _negative_log_likelihood(theta, squares, process.values)

    covariance = process.amplitude * matern(process.points, process.points, process.lengths)
    covariance += process.noise * np.eye(7)
    expected = multivariate_normal(np.zeros(7), covariance).logpdf(process.values)
    assert value == pytest.approx(-expected, rel=1e-9)

    numeric = approx_fprime(
        theta, lambda at: _negative_log_likelihood(at, squares, process.values)[0], 1e-7
    )
    np.testing.assert_allclose(gradient, numeric, rtol=1e-4, atol=1e-5)


def test_prediction_is_the_conditional_of_the_joint_normal() -> None:
    process = some_process()
    where = np.array([[0.2, 0.3], [0.9, 0.1]])
    everything = np.vstack([process.points, where])
    joint = process.amplitude * matern(everything, everything, process.lengths)
    known = joint[:7, :7] + process.noise * np.eye(7)
    cross = joint[7:, :7] @ np.linalg.inv(known)
    mean, sd = process.predict(where)
    np.testing.assert_allclose(mean, cross @ process.values, rtol=1e-9)
    variance = np.diag(joint[7:, 7:] - cross @ joint[:7, 7:])
    np.testing.assert_allclose(sd, np.sqrt(variance), rtol=1e-7)


def test_believing_what_is_expected_changes_no_mean_and_lowers_the_doubt() -> None:
    process = some_process()
    pending = np.array([[0.5, 0.9]])
    believer = process.believing(pending)
    where = np.array([[0.2, 0.3], [0.55, 0.85]])
    np.testing.assert_allclose(believer.predict(where)[0], process.predict(where)[0], rtol=1e-9)
    assert np.all(believer.predict(where)[1] < process.predict(where)[1])


@pytest.mark.parametrize("mean", [-2.0, 0.0, 1.0, 3.0, 5.5])
def test_expected_improvement_matches_its_integral(mean: float) -> None:
    best, sd = 0.4, 0.8

    def gain(value: float) -> float:
        return (best - value) * norm.pdf(value, mean, sd)

    integral, _ = quad(gain, best - 20, best, epsabs=0, epsrel=1e-10, points=[best - 1])
    found = log_expected_improvement(np.array([mean]), np.array([sd]), best)[0]
    assert found == pytest.approx(math.log(integral), abs=2e-3)


def test_expected_improvement_falls_on_where_it_underflows() -> None:
    means = np.array([2.0, 10.0, 50.0, 100.0])
    gains = log_expected_improvement(means, np.ones(4), 0.0)
    assert np.all(np.isfinite(gains))
    assert np.all(np.diff(gains) < 0)


def test_next_point_finds_the_bottom_of_a_bowl() -> None:
    rng = np.random.default_rng(0)
    points = rng.random((40, 2))
    values = np.square(points - [0.3, 0.6]).sum(axis=1)
    scores = (values - values.mean()) / values.std()
    process = GaussianProcess.fit(points, scores)
    found = next_point(process, float(scores.min()), rng)
    assert np.abs(found - [0.3, 0.6]).max() < 0.1
