"""The specification of a search: what a space file says, checked once.

`load_spec` reads a file of ``search_spaces/`` by name, or any YAML file by path, with
overrides of single fields; `resolved_dict` and `spec_from_dict` carry a specification
through ``search.json``. Everything behind them can trust what it is given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from optuna import Trial
from optuna.distributions import BaseDistribution
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictStr,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from desisky_tune.data.columns import FEATURES
from desisky_tune.search.folder import valid_run_name
from desisky_tune.search.parameters import (
    HYPERPARAMETERS,
    Fixed,
    Parameter,
    Problem,
    read_parameter,
    unknown_key,
)

_DURATION = re.compile(r"(?:(\d+(?:\.\d*)?)h)?(?:(\d+(?:\.\d*)?)m)?(?:(\d+(?:\.\d*)?)s?)?")


def _whole(value: Any) -> Any:
    """Take 1e3 for 1000, and nothing else that is not an integer."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _seconds(value: Any) -> Any:
    """Turn '90', '90s', '10m' or '1h30m' into seconds."""
    if not isinstance(value, str):
        return value
    match = _DURATION.fullmatch(value.replace(" ", ""))
    if not match or not any(match.groups()):
        raise PydanticCustomError("duration", "must be seconds, or a time such as '10m' or '1h30m'")
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return 3600 * hours + 60 * minutes + seconds


def _auto(value: Any) -> Any:
    return None if value == "auto" else value


Whole = Annotated[int, Field(strict=True), BeforeValidator(_whole)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Seed = Annotated[Whole, Field(ge=0, le=2**32 - 1)]
Text = Annotated[StrictStr, Field(min_length=1)]


class _Section(BaseModel):
    """A section of a space file: unknown keys are refused, nothing changes later."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataSpec(_Section):
    """Which exposures a search uses.

    Attributes
    ----------
    source
        ``sv1`` (shipped), ``vac``, or a path of a VAC or a table.
    subset
        Which exposures of the source.
    eclipse
        ``exact`` computes the eclipsed fraction of the Moon, ``none`` sets it to 0.
    exclude_known_bad
        Leave out the nights that are known to be bad.
    features
        Columns that the model gets.
    """

    source: Text = "sv1"
    subset: Literal["moon", "dark", "twilight", "all"] = "moon"
    eclipse: Literal["exact", "none"] = "exact"
    exclude_known_bad: StrictBool = True
    features: tuple[Text, ...] = FEATURES

    @field_validator("features")
    @classmethod
    def _features_differ(cls, features: tuple[str, ...]) -> tuple[str, ...]:
        if not features or len(set(features)) < len(features):
            raise PydanticCustomError("features", "must name at least one column, each once")
        return features


class SplitSpec(_Section):
    """How the exposures are divided into training, validation and test rows."""

    by: Text = "NIGHT"
    fractions: tuple[Real, Real, Real] = (0.6, 0.2, 0.2)
    seed: Seed = 0

    @field_validator("fractions")
    @classmethod
    def _fractions_are_shares(
        cls, fractions: tuple[float, float, float]
    ) -> tuple[float, float, float]:
        if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
            raise PydanticCustomError(
                "fractions",
                "must be three shares above 0 (train, validation, test) that add up to 1",
            )
        return fractions


class TrainingSpec(_Section):
    """What all trials share."""

    epochs: Annotated[Whole, Field(ge=1, le=1_000_000)] = 500
    loss: Literal["huber", "l2"] = "huber"
    seed: Seed = 0


class SearchOptions(_Section):
    """How the space is searched.

    Attributes
    ----------
    trials
        Trials in all, the documented default included.
    sampler
        Which sampler of `desisky_tune.search.samplers` suggests configurations.
    seed
        Of the sampler.
    scheduler
        ``asha`` stops trials that fall behind at a rung; ``none`` trains all in full.
    grace, reduction
        The first rung (epochs), and the factor from each rung to the next: at a rung
        about one trial in `reduction` goes on.
    time_limit
        Seconds after which no trial is continued; None for no limit.
    startup_trials
        Finished trials before tpe, gp and cmaes learn from them.
    max_failures
        How often a trial whose process died is started again.
    default_first
        Make the documented default trial 0, trained in full.
    """

    trials: Annotated[Whole, Field(ge=1, le=100_000)] = 32
    sampler: Literal["tpe", "gp", "cmaes", "random", "qmc"] = "tpe"
    seed: Seed = 0
    scheduler: Literal["asha", "none"] = "asha"
    grace: Annotated[Whole, Field(ge=1)] = 50
    reduction: Annotated[Whole, Field(ge=2, le=100)] = 3
    time_limit: Annotated[Annotated[Real, Field(gt=0)] | None, BeforeValidator(_seconds)] = None
    startup_trials: Annotated[Whole, Field(ge=1)] = 10
    max_failures: Annotated[Whole, Field(ge=0, le=100)] = 2
    default_first: StrictBool = True


def _only(value: int, what: str) -> AfterValidator:
    def check(given: int) -> int:
        if given != value:
            raise PydanticCustomError("unsupported", f"{what}: this version supports {value} only")
        return given

    return AfterValidator(check)


class EvaluationSpec(_Section):
    """How a configuration is measured.

    Attributes
    ----------
    folds
        1: the split's validation rows. More: each trial trains on so many folds of the
        training and validation rows, whole groups of ``split.by``.
    seeds
        Each trial trains with so many seeds, from ``training.seed`` on.
    """

    folds: Annotated[Whole, Field(ge=1, le=100)] = 1
    seeds: Annotated[Whole, Field(ge=1, le=100)] = 1
    finalists: Annotated[Whole, _only(0, "a stage of finalists")] = 0


class ResourceSpec(_Section):
    """What a trial may use, and how many are trained at a time.

    Attributes
    ----------
    workers
        Trials trained at a time, by all engines together; None for what the machine or the
        cluster holds. With 1 there is one trial in flight, and every sampler repeats itself.
    cpus_per_trial
        CPUs that are reserved for each.
    gpus_per_trial
        0 trains on CPUs, anything else on GPUs: of a fraction as many trials at a time on
        each as it allows.
    slots
        Trainings side by side in a program on a GPU; None for what a calibration finds. At
        least so many trials are in flight on each GPU that they can fill them.
    """

    workers: Annotated[Annotated[Whole, Field(ge=1, le=10_000)] | None, BeforeValidator(_auto)] = (
        None
    )
    cpus_per_trial: Annotated[Real, Field(gt=0)] = 1.0
    gpus_per_trial: Annotated[Real, Field(ge=0)] = 0.0
    slots: Annotated[Annotated[Whole, Field(ge=1, le=100_000)] | None, BeforeValidator(_auto)] = (
        None
    )

    @field_validator("gpus_per_trial")
    @classmethod
    def _whole_above_one(cls, gpus: float) -> float:
        if gpus > 1 and not gpus.is_integer():
            raise PydanticCustomError("gpus", "must be a fraction up to 1, or a whole number")
        return gpus


class SearchSpec(_Section):
    """A whole search. Made by `load_spec` and `spec_from_dict`.

    Attributes
    ----------
    name
        What runs are called.
    space
        Every hyperparameter; those that a file does not mention keep one value, the
        documented default's.
    """

    name: Annotated[Text, AfterValidator(valid_run_name)] = "search"
    data: DataSpec = DataSpec()
    split: SplitSpec = SplitSpec()
    space: dict[str, Any] = Field(default_factory=dict, validate_default=True)
    training: TrainingSpec = TrainingSpec()
    search: SearchOptions = SearchOptions()
    evaluation: EvaluationSpec = EvaluationSpec()
    resources: ResourceSpec = ResourceSpec()

    @field_validator("space", mode="before")
    @classmethod
    def _read_space(cls, given: Any) -> dict[str, Parameter]:
        if not isinstance(given, Mapping):
            raise PydanticCustomError("space", "must name hyperparameters, one per line")
        problems = [
            Problem(f"space.{name}", value, unknown_key(str(name), list(HYPERPARAMETERS)))
            for name, value in given.items()
            if name not in HYPERPARAMETERS
        ]
        space: dict[str, Parameter] = {}
        for name, kind in HYPERPARAMETERS.items():
            parameter, broken = read_parameter(name, given.get(name, kind.default))
            problems += broken
            if parameter is not None:
                space[name] = parameter
        if problems:
            raise PydanticCustomError("parameters", "see problems", {"problems": problems})
        return space

    @model_validator(mode="after")
    def _delta_needs_huber(self) -> SearchSpec:
        if self.training.loss == "l2" and not isinstance(self.space["huber_delta"], Fixed):
            problem = Problem(
                "space.huber_delta",
                self.space["huber_delta"].entry(),
                "training.loss is l2, which has no delta: leave huber_delta out or give one value",
            )
            raise PydanticCustomError("parameters", "see problems", {"problems": [problem]})
        return self

    @field_serializer("space")
    def _write_space(self, space: dict[str, Any]) -> dict[str, Any]:
        return {name: parameter.entry() for name, parameter in space.items()}

    def suggest(self, trial: Trial) -> dict[str, int | float]:
        """Return a configuration: every hyperparameter, as `trial` suggests it."""
        return {name: parameter.suggest(name, trial) for name, parameter in self.space.items()}

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return the distribution of each hyperparameter that is searched."""
        found = {name: parameter.distribution for name, parameter in self.space.items()}
        return {name: each for name, each in found.items() if each is not None}

    def fixed_configuration(self) -> dict[str, int | float]:
        """Return the hyperparameters that have one value."""
        return {
            name: parameter.value
            for name, parameter in self.space.items()
            if isinstance(parameter, Fixed)
        }

    def as_params(
        self, configuration: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
        """Write a configuration as a study keeps it.

        A number outside its range widens the distribution of that trial; a choice that
        is not on the list is left out, because a list cannot grow within a study.

        Returns
        -------
        params, distributions
            By name of hyperparameter, for those that are searched.
        """
        params: dict[str, Any] = {}
        distributions: dict[str, BaseDistribution] = {}
        for name, parameter in self.space.items():
            if isinstance(parameter, Fixed):
                continue
            distribution = parameter.widened(configuration[name])
            if distribution is not None:
                params[name], distributions[name] = configuration[name], distribution
        return params, distributions


def default_configuration(spec: SearchSpec | None = None) -> dict[str, int | float]:
    """Return the documented default (128 x 5, 1e-4, 0.25, batch 32), whatever the space says."""
    return {name: kind.default for name, kind in HYPERPARAMETERS.items()}


def rungs(spec: SearchSpec) -> list[int]:
    """Return the epochs at which a trial reports: grace x reduction^k below the last, the last."""
    epochs, reached = [], spec.search.grace
    while reached < spec.training.epochs:
        epochs.append(reached)
        reached *= spec.search.reduction
    return [*epochs, spec.training.epochs]


def resolved_dict(spec: SearchSpec) -> dict[str, Any]:
    """Return a specification as JSON-able values; `spec_from_dict` reads them back."""
    return spec.model_dump(mode="json")


def load_spec(name_or_path: Any = "quick", overrides: Any = ()) -> SearchSpec:
    """Read a space file; see `desisky_tune.search.space_file.load_spec`."""
    from desisky_tune.search.space_file import load_spec as load

    return load(name_or_path, overrides)


def spec_from_dict(content: Mapping[str, Any], where: str = "specification") -> SearchSpec:
    """Read what `resolved_dict` gave; see `desisky_tune.search.space_file.check`."""
    from desisky_tune.search.space_file import check

    return check(content, where=where)
