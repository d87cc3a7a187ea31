"""The sections of a space file beside the space itself, each checked as it is read."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictStr,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from desisky_tune.data.columns import FEATURES
from desisky_tune.search.expression import read_condition
from desisky_tune.search.hyperparameters import HYPERPARAMETERS, WORDS, Value
from desisky_tune.search.reading import Problem, read_configuration

#: What ``pretrain`` calls the simulated catalogue.
SIMULATED = "simulated"

#: What constraints call the number of weights and biases.
PARAMETERS = "parameters"

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


class Section(BaseModel):
    """A section of a space file: unknown keys are refused, nothing changes later."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataSpec(Section):
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


class SplitSpec(Section):
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


class TrainingSpec(Section):
    """What all trials share."""

    epochs: Annotated[Whole, Field(ge=1, le=1_000_000)] = 500
    loss: Literal["huber", "l2"] = "huber"
    seed: Seed = 0


def pretrain_section(value: Any) -> Any:
    """Take 'simulated', a run or a checkpoint for the section that names it alone."""
    return {"source": value} if isinstance(value, str) else value


class PretrainSpec(Section):
    """Where the weights come from with which every training begins.

    Attributes
    ----------
    source
        ``simulated``: pretrained on a simulated catalogue. Else the folder or URL of a run,
        whose winner's weights are taken, or the path of a checkpoint (.eqx).
    exposures, seed
        Of the simulated catalogue; it is cut to ``data.subset``.
    epochs, learning_rate, batch_size
        Of the pretraining on it.
    """

    source: Text
    exposures: Annotated[Whole, Field(ge=200, le=18_000)] = 6000
    epochs: Annotated[Whole, Field(ge=1, le=1_000_000)] = 60
    learning_rate: Annotated[Real, Field(gt=0, le=10)] = 1e-3
    batch_size: Annotated[Whole, Field(ge=1, le=1_000_000)] = 32
    seed: Seed = 0

    @property
    def simulated(self) -> bool:
        """Whether the weights are trained here, on a simulated catalogue."""
        return self.source == SIMULATED

    @model_validator(mode="after")
    def _given_weights_are_not_trained(self) -> PretrainSpec:
        fields = type(self).model_fields
        problems = [
            Problem(f"pretrain.{name}", value, f"is of pretrain.source = {SIMULATED} alone")
            for name, value in self.model_dump().items()
            if name != "source" and not self.simulated and value != fields[name].default
        ]
        if problems:
            raise PydanticCustomError("parameters", "see problems", {"problems": problems})
        return self


class SearchOptions(Section):
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
    deterministic
        Let nothing that is suggested or stopped depend on which trial happens to end first.
    default_first
        Make the documented default trial 0, trained in full.
    objectives
        What is minimised: the RMSE, and the number of weights too where it is named.
    max_parameters
        Weights and biases that a model may have; None for any number.
    constraints
        Conditions on the hyperparameters and ``parameters`` that every trial must fulfil.
    warm_start
        Configurations that are tried first, after the documented default.
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
    deterministic: StrictBool = False
    default_first: StrictBool = True
    objectives: tuple[Literal["rmse", "parameters"], ...] = ("rmse",)
    max_parameters: Annotated[Whole, Field(ge=1)] | None = None
    constraints: tuple[Text, ...] = ()
    warm_start: tuple[dict[str, Any], ...] = ()

    @field_validator("objectives")
    @classmethod
    def _rmse_leads(cls, objectives: tuple[str, ...]) -> tuple[str, ...]:
        if objectives not in (("rmse",), ("rmse", "parameters")):
            raise PydanticCustomError("objectives", "must be [rmse] or [rmse, parameters]")
        return objectives

    @field_validator("constraints")
    @classmethod
    def _constraints_can_be_read(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        problems = []
        for index, text in enumerate(texts):
            try:
                read_condition(text, (*HYPERPARAMETERS, PARAMETERS), WORDS)
            except ValueError as error:
                problems.append(Problem(f"search.constraints[{index}]", text, str(error)))
        if problems:
            raise PydanticCustomError("parameters", "see problems", {"problems": problems})
        return texts

    @field_validator("warm_start")
    @classmethod
    def _configurations_are_whole(cls, given: Any) -> tuple[dict[str, Value], ...]:
        read = [
            read_configuration(f"search.warm_start[{index}]", each)
            for index, each in enumerate(given)
        ]
        problems = [problem for _, broken in read for problem in broken]
        if problems:
            raise PydanticCustomError("parameters", "see problems", {"problems": problems})
        return tuple(configuration for configuration, _ in read)

    @model_validator(mode="after")
    def _two_objectives_are_known_to_some(self) -> SearchOptions:
        problems = []
        if len(self.objectives) > 1 and self.sampler in ("gp", "cmaes"):
            rule = "knows one objective; with [rmse, parameters] it must be tpe, random or qmc"
            problems.append(Problem("search.sampler", self.sampler, rule))
        if len(self.objectives) > 1 and self.scheduler == "asha":
            rule = (
                "would stop small models for their RMSE; with objectives [rmse, parameters] "
                "it must be none"
            )
            problems.append(Problem("search.scheduler", self.scheduler, rule))
        if problems:
            raise PydanticCustomError("parameters", "see problems", {"problems": problems})
        return self


class EvaluationSpec(Section):
    """How a configuration is measured.

    Attributes
    ----------
    folds
        1: the split's validation rows. More: each trial trains on so many folds of the
        training and validation rows, whole groups of ``split.by``.
    seeds
        Each trial trains with so many seeds, from ``training.seed`` on.
    finalists
        The best so many configurations are trained once more, on folds of the training
        and validation rows; the documented default is always among them. 0: the winner is
        the trial with the lowest objective.
    finalist_folds, finalist_seeds
        Folds, and seeds on each of them.
    final_seeds
        The final fit makes so many trainings, each with a seed of its own, on all rows but
        the test rows; the checkpoint is the mean of these networks, which is one network.
    committee
        What is exported is the mean of a training on each of the finalists' folds, of the best
        so many finalists in turn, as one network. 1: the winner's final fit.
    classical
        The classical model has a voice in the committee, with the weight that the folds give it.
    ensemble
        The members of the best so many finalists make an ensemble; 0: none is made.

    A search whose trials have several members ends with finalists in any case: its best
    configuration and the documented default, on the same folds.
    """

    folds: Annotated[Whole, Field(ge=1, le=100)] = 1
    seeds: Annotated[Whole, Field(ge=1, le=100)] = 1
    finalists: Annotated[Whole, Field(ge=0, le=1000)] = 0
    finalist_folds: Annotated[Whole, Field(ge=2, le=100)] = 5
    finalist_seeds: Annotated[Whole, Field(ge=1, le=100)] = 3
    final_seeds: Annotated[Whole, Field(ge=1, le=100)] = 5
    committee: Annotated[Whole, Field(ge=1, le=100)] = 3
    classical: StrictBool = True
    ensemble: Annotated[Whole, Field(ge=0, le=1000)] = 3

    @field_validator("finalists")
    @classmethod
    def _none_or_several(cls, finalists: int) -> int:
        if finalists == 1:
            raise PydanticCustomError(
                "finalists", "must be 0 or at least 2: the documented default is one of them"
            )
        return finalists

    @property
    def final_plan(self) -> tuple[int, int, int]:
        """Finalists, folds and seeds on each fold; no finalists: 0, 1, 1."""
        if self.finalists:
            return self.finalists, self.finalist_folds, self.finalist_seeds
        if self.folds > 1 or self.seeds > 1:
            return 2, self.folds, self.seeds
        return 0, 1, 1


class ResourceSpec(Section):
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
