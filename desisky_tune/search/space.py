"""The specification of a search: what a space file says, checked once.

`load_spec` reads a file of ``search_spaces/`` by name, or any YAML file by path, with
overrides of single fields; `resolved_dict` and `spec_from_dict` carry a specification
through ``search.json``. Everything behind them can trust what it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from optuna import Trial
from optuna.distributions import BaseDistribution
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from desisky_tune.search.expression import Condition
from desisky_tune.search.folder import valid_run_name
from desisky_tune.search.hyperparameters import (
    DOCUMENTED,
    HYPERPARAMETERS,
    Value,
    in_full,
    is_documented_default,
)
from desisky_tune.search.parameters import Conditional, Fixed, Parameter
from desisky_tune.search.reading import Problem, read_parameter, unknown_key
from desisky_tune.search.records import parameter_count
from desisky_tune.search.sections import (
    PARAMETERS,
    DataSpec,
    EvaluationSpec,
    PretrainSpec,
    ResourceSpec,
    SearchOptions,
    Section,
    SplitSpec,
    Text,
    TrainingSpec,
    pretrain_section,
)


class SearchSpec(Section):
    """A whole search. Made by `load_spec` and `spec_from_dict`.

    Attributes
    ----------
    name
        What runs are called.
    space
        Every hyperparameter of the documented default, and the optional ones that a file
        mentions; the others keep one value, the documented default's.
    pretrain
        Where the first weights come from; None draws them, by the seed.
    """

    name: Annotated[Text, AfterValidator(valid_run_name)] = "search"
    data: DataSpec = DataSpec()
    split: SplitSpec = SplitSpec()
    space: dict[str, Any] = Field(default_factory=dict, validate_default=True)
    pretrain: Annotated[PretrainSpec | None, BeforeValidator(pretrain_section)] = None
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
            if kind.optional and name not in given:
                continue
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

    @model_validator(mode="after")
    def _nothing_is_calibrated(self) -> SearchSpec:
        resources = self.resources
        if self.search.deterministic and resources.gpus_per_trial and resources.slots is None:
            rule = (
                "with search.deterministic on GPUs it must be a number: a calibration goes by the "
                "clock, and the last bits of all figures by the slots"
            )
            problem = Problem("resources.slots", "auto", rule)
            raise PydanticCustomError("parameters", "see problems", {"problems": [problem]})
        return self

    @model_validator(mode="after")
    def _something_is_pretrained(self) -> SearchSpec:
        alone = all(isinstance(parameter, Fixed) for parameter in self.space.values())
        default = default_configuration(self)
        if self.pretrain and self.fixed_configuration() == default and alone:
            rule = (
                "nothing would begin with these weights: the space holds the documented default "
                "alone, which is always trained from weights of its own"
            )
            problem = Problem("pretrain", self.pretrain.source, rule)
            raise PydanticCustomError("parameters", "see problems", {"problems": [problem]})
        return self

    @model_validator(mode="after")
    def _warm_start_keeps_the_constraints(self) -> SearchSpec:
        problems = [
            Problem(f"search.warm_start[{index}]", configuration, f"breaks {broken}")
            for index, configuration in enumerate(self.search.warm_start)
            if (broken := self.broken_constraint(configuration))
        ]
        if problems:
            raise PydanticCustomError("parameters", "see problems", {"problems": problems})
        return self

    @field_serializer("space")
    def _write_space(self, space: dict[str, Any]) -> dict[str, Any]:
        return {name: parameter.entry() for name, parameter in space.items()}

    def suggest(self, trial: Trial) -> dict[str, Value]:
        """Return a configuration: every hyperparameter, as `trial` suggests it."""
        configuration: dict[str, Value] = {}
        for name, parameter in self.space.items():
            if isinstance(parameter, Conditional) and not parameter.applies(configuration):
                configuration[name] = parameter.otherwise
            else:
                configuration[name] = parameter.suggest(name, trial)
        return configuration

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return the distribution of each hyperparameter that is searched."""
        found = {name: parameter.distribution for name, parameter in self.space.items()}
        return {name: each for name, each in found.items() if each is not None}

    def unconditional(self) -> dict[str, BaseDistribution]:
        """Return the distributions of those that are searched in every trial."""
        return {
            name: each
            for name, each in self.distributions().items()
            if not isinstance(self.space[name], Conditional)
        }

    @property
    def constrained(self) -> bool:
        """Whether some configurations of the space must not be tried."""
        return bool(self.search.constraints) or self.search.max_parameters is not None

    def broken_constraint(self, configuration: Mapping[str, Any]) -> str | None:
        """Return the first constraint that a configuration breaks, as a space file has it."""
        count = parameter_count(configuration, inputs=len(self.data.features))
        most = self.search.max_parameters
        if most is not None and count > most:
            return f"search.max_parameters {most:,} (it has {count:,})"
        for index, text in enumerate(self.search.constraints):
            if not Condition(text).holds({**in_full(configuration), PARAMETERS: count}):
                return f"search.constraints[{index}] {text!r}"
        return None

    def first_configurations(self) -> list[dict[str, Value]]:
        """Return what is tried before anything is suggested: the default, then the warm start.

        The documented default is left out where it breaks a constraint.
        """
        default = default_configuration(self)
        first = [default] if self.default_runs else []
        return [*first, *(dict(each) for each in self.search.warm_start)]

    @property
    def default_runs(self) -> bool:
        """Whether trial 0 is the documented default."""
        wanted = self.search.default_first
        return wanted and self.broken_constraint(default_configuration(self)) is None

    def is_pretrained(self, configuration: Mapping[str, Any]) -> bool:
        """Whether a configuration begins with the weights of ``pretrain``.

        The documented default never does: beside it stands what the transfer is worth.
        """
        return self.pretrain is not None and not is_documented_default(configuration)

    def fixed_configuration(self) -> dict[str, Value]:
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
        is not on the list is left out, because a list cannot grow within a study, and so is
        a 0 beside a logarithmic range.

        Returns
        -------
        params, distributions
            By name of hyperparameter, for those that are searched.
        """
        params: dict[str, Any] = {}
        distributions: dict[str, BaseDistribution] = {}
        for name, parameter in self.space.items():
            if isinstance(parameter, Fixed) or (
                isinstance(parameter, Conditional) and not parameter.applies(configuration)
            ):
                continue
            value = configuration.get(name, HYPERPARAMETERS[name].default)
            distribution = parameter.widened(value)
            if distribution is not None:
                params[name], distributions[name] = value, distribution
        return params, distributions


def default_configuration(spec: SearchSpec | None = None) -> dict[str, Value]:
    """Return the documented default (128 x 5, 1e-4, 0.25, batch 32), whatever the space says.

    With a specification, the optional hyperparameters that its space names stand there too,
    each off.
    """
    names = DOCUMENTED if spec is None else spec.space
    return {name: HYPERPARAMETERS[name].default for name in names}


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
