"""What a space file says of hyperparameters, read and checked, with a rule for each fault."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from desisky_tune.data.names import nearest_name
from desisky_tune.search.expression import read_condition
from desisky_tune.search.hyperparameters import (
    HYPERPARAMETERS,
    WORDS,
    Hyperparameter,
    Number,
    Value,
)
from desisky_tune.search.parameters import (
    ENTRY_KEYS,
    Choices,
    Conditional,
    Fixed,
    Parameter,
    Range,
)


@dataclass(frozen=True)
class Problem:
    """One rule that a space file breaks.

    Attributes
    ----------
    field
        Dotted name, such as ``space.width.low``; empty for the file as a whole.
    given
        The value that stands there.
    rule
        What is allowed.
    """

    field: str
    given: Any
    rule: str


def unknown_key(name: str, allowed: list[str]) -> str:
    """The rule for a key that does not exist."""
    near = nearest_name(name, allowed)
    hint = f"; did you mean {near!r}?" if near else ""
    return f"unknown key{hint} (allowed: {', '.join(allowed)})"


def read_parameter(name: str, given: Any) -> tuple[Parameter | None, list[Problem]]:
    """Read what a space file says of one hyperparameter.

    Parameters
    ----------
    name
        One of `HYPERPARAMETERS`.
    given
        ``{low, high, log, step}``, ``{choices}`` or a value.

    Returns
    -------
    parameter
        None where there is a problem.
    problems
        Every rule that is broken.
    """
    kind, field = HYPERPARAMETERS[name], f"space.{name}"
    if isinstance(given, Range | Choices | Fixed | Conditional):
        given = given.entry()
    if not isinstance(given, Mapping):
        if isinstance(given, list):
            rule = f"a list of values is written {{choices: {given}}}"
            return None, [Problem(field, given, rule)]
        problems: list[Problem] = []
        value = _value(kind, field, given, problems)
        return (None if problems else Fixed(value)), problems
    if "when" in given or "otherwise" in given:
        return _read_conditional(kind, field, given)
    if "choices" in given:
        return _read_choices(kind, field, given)
    if kind.words:
        rule = f"must be {kind.rule}, or {{choices: [{', '.join(kind.words)}]}}"
        return None, [Problem(field, dict(given), rule)]
    return _read_range(kind, field, given)


def read_configuration(field: str, given: Any) -> tuple[dict[str, Value], list[Problem]]:
    """Read a whole configuration; what it does not name has the documented default's value.

    Parameters
    ----------
    field
        Where it stands, for messages.
    given
        Values by name.

    Returns
    -------
    configuration, problems
    """
    if not isinstance(given, Mapping):
        return {}, [Problem(field, given, "must name hyperparameters and their values")]
    problems = [
        Problem(f"{field}.{name}", value, unknown_key(str(name), list(HYPERPARAMETERS)))
        for name, value in given.items()
        if name not in HYPERPARAMETERS
    ]
    configuration = {
        name: _value(kind, f"{field}.{name}", given.get(name, kind.default), problems)
        for name, kind in HYPERPARAMETERS.items()
        if name in given or not kind.optional
    }
    return configuration, problems


def _read_conditional(
    kind: Hyperparameter, field: str, given: Mapping[str, Any]
) -> tuple[Parameter | None, list[Problem]]:
    inner, problems = read_parameter(
        kind.name, {key: given[key] for key in given if key not in ("when", "otherwise")}
    )
    names = list(HYPERPARAMETERS)
    before = names[: names.index(kind.name)]
    text, condition = given.get("when"), None
    if not before:
        problems.append(
            Problem(f"{field}.when", text, f"{kind.name} comes first, and depends on nothing")
        )
    elif not isinstance(text, str):
        problems.append(Problem(f"{field}.when", text, "must be a condition, such as 'depth > 2'"))
    else:
        try:
            condition = read_condition(text, before, WORDS)
        except ValueError as error:
            problems.append(Problem(f"{field}.when", text, str(error)))
    given_value = given.get("otherwise", kind.default)
    otherwise = _value(kind, f"{field}.otherwise", given_value, problems)
    if problems or condition is None or not isinstance(inner, Range | Choices):
        return None, problems
    return Conditional(inner, condition, otherwise), []


def _read_choices(
    kind: Hyperparameter, field: str, given: Mapping[str, Any]
) -> tuple[Parameter | None, list[Problem]]:
    problems = [
        Problem(f"{field}.{key}", given[key], "choices stand alone, without low, high, log, step")
        for key in given
        if key != "choices"
    ]
    choices = given["choices"]
    if not isinstance(choices, list | tuple) or not choices:
        problems.append(
            Problem(f"{field}.choices", choices, f"must list at least one value, {kind.rule}")
        )
        return None, problems
    values = [
        _value(kind, f"{field}.choices[{index}]", value, problems)
        for index, value in enumerate(choices)
    ]
    if not problems and len(set(values)) < len(values):
        problems.append(Problem(f"{field}.choices", choices, "must name each value once"))
    return (None if problems else Choices(tuple(values))), problems


def _read_range(
    kind: Hyperparameter, field: str, given: Mapping[str, Any]
) -> tuple[Parameter | None, list[Problem]]:
    allowed = list(ENTRY_KEYS)
    problems = [
        Problem(f"{field}.{key}", given[key], unknown_key(str(key), allowed))
        for key in given
        if key not in allowed
    ]
    log = given.get("log", False)
    if not isinstance(log, bool):
        problems.append(Problem(f"{field}.log", log, "must be true or false"))
    bounds: dict[str, Number] = {}
    for end in ("low", "high"):
        if end not in given:
            problems.append(Problem(field, dict(given), f"needs low and high; {end} is missing"))
        elif log is True and _is_number(given[end]) and given[end] <= 0:
            rule = "must be above 0 on a log scale"
            problems.append(Problem(f"{field}.{end}", given[end], rule))
        else:
            bound = _value(kind, f"{field}.{end}", given[end], problems)
            assert not isinstance(bound, str)
            bounds[end] = bound
    if problems:
        return None, problems
    low, high = bounds["low"], bounds["high"]
    if low >= high:
        return None, [Problem(f"{field}.low", low, f"must be below high ({high:g})")]
    step = given.get("step")
    if step is not None:
        broken = _step_rule(kind, step, low, high, log)
        if broken:
            return None, [Problem(f"{field}.step", step, broken)]
        step = int(step) if kind.whole else float(step)
    elif kind.whole:
        step = 1
    return Range(low, high, log=log, step=step, whole=kind.whole), []


def _step_rule(kind: Hyperparameter, step: Any, low: Number, high: Number, log: bool) -> str | None:
    """The rule that a step breaks, if any."""
    if not _is_number(step) or (kind.whole and step != int(step)):
        return f"must be {'a whole number' if kind.whole else 'a number'} above 0"
    if log and not (kind.whole and step == 1):
        return "cannot be combined with log: true"
    if not 0 < step <= high - low:
        return f"must be above 0 and at most high - low ({high - low:g})"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _value(kind: Hyperparameter, field: str, value: Any, problems: list[Problem]) -> Value:
    """Return `value` as one of `kind`; where it is none, note the problem."""
    try:
        return kind.coerce(value)
    except ValueError as error:
        problems.append(Problem(field, value, str(error)))
        return kind.default
