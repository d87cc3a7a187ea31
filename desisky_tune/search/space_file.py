"""Space files: found by name or path, overridden field by field, explained when wrong."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from desisky_tune.data.names import nearest_name
from desisky_tune.errors import SpaceError
from desisky_tune.search.hyperparameters import HYPERPARAMETERS
from desisky_tune.search.parameters import ENTRY_KEYS
from desisky_tune.search.reading import Problem, unknown_key
from desisky_tune.search.sections import SIMULATED
from desisky_tune.search.space import SearchSpec
from desisky_tune.search.yaml_reader import YamlError, read_yaml

#: A space file is a page of text; what is larger is something else.
LARGEST_FILE = 1_000_000


def spaces_folder() -> Path:
    """Return the folder of the space files: inside the wheel, beside it in a checkout."""
    package = Path(str(files("desisky_tune")))
    installed = package / "search_spaces"
    return installed if installed.is_dir() else package.parent / "search_spaces"


def space_names() -> list[str]:
    """Return the names that `load_spec` knows without a path."""
    return sorted(path.stem for path in spaces_folder().glob("*.yaml"))


def find_space(name_or_path: str | os.PathLike[str]) -> Path:
    """Return the file of a space.

    Parameters
    ----------
    name_or_path
        A name of `space_names`, or a path.

    Raises
    ------
    SpaceError
        When there is no such file.
    """
    text = os.fspath(name_or_path)
    names = space_names()
    if text in names:
        return spaces_folder() / f"{text}.yaml"
    path = Path(text).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise SpaceError(f"{path} is a folder; a space file is wanted, such as {path}/mine.yaml")
    near = nearest_name(path.stem, names)
    hint = f"; did you mean {near!r}?" if near else ""
    raise SpaceError(
        f"no space file {text!r}{hint} (known names: {', '.join(names)}; or a path to a .yaml file)"
    )


def load_spec(
    name_or_path: str | os.PathLike[str] = "quick", overrides: Sequence[str] = ()
) -> SearchSpec:
    """Read a space file.

    Parameters
    ----------
    name_or_path
        ``"quick"``, ``"broadband"``, or the path of a YAML file.
    overrides
        Fields to set, such as ``"search.trials=6"`` or ``"space.depth.high=4"``; values
        are YAML. A later one counts.

    Returns
    -------
    SearchSpec

    Raises
    ------
    SpaceError
        With one line per problem: file, field, value, rule.
    """
    path = find_space(name_or_path)
    content = _read(path)
    if not isinstance(content, dict):
        raise SpaceError(
            f"{path}: must hold sections such as 'space:' and 'search:', not {_show(content)}"
        )
    content = copy.deepcopy(content)
    content.setdefault("name", path.stem)
    sources = _apply(content, overrides)
    _adopt_architecture(content)
    return check(content, where=str(path), sources=sources)


def check(
    content: Mapping[str, Any], *, where: str, sources: Mapping[str, str] | None = None
) -> SearchSpec:
    """Check a specification.

    Parameters
    ----------
    content
        Sections by name, as a space file or `resolved_dict` has them.
    where
        The file, for messages.
    sources
        Where a field came from instead, by dotted name.

    Raises
    ------
    SpaceError
        With one line per problem.
    """
    # A section whose every line is commented out reads as nothing; no pretraining is none.
    sections_of = [name for name in SearchSpec.model_fields if name != "pretrain"]
    sections = {
        name: {} if value is None and name in sections_of else value
        for name, value in content.items()
    }
    try:
        return SearchSpec.model_validate(sections)
    except ValidationError as error:
        problems = [found for detail in error.errors() for found in _problems(detail)]
    lines = []
    for problem in problems:
        source = _source(problem.field, sources or {}) or where
        given = f" = {_show(problem.given)}" if problem.field else ""
        lines.append(f"{source}: {problem.field}{given}: {problem.rule}")
    raise SpaceError("\n".join(dict.fromkeys(lines)))


def _adopt_architecture(content: dict[str, Any]) -> None:
    """Let the width and depth of given weights stand where a file says nothing of them."""
    section, space = content.get("pretrain"), content.get("space") or {}
    source = section.get("source") if isinstance(section, Mapping) else section
    if not isinstance(source, str) or source == SIMULATED or not isinstance(space, Mapping):
        return
    from desisky_tune.search.given_weights import architecture_of

    content["space"] = {**architecture_of(source), **space}


def _read(path: Path) -> Any:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise SpaceError(f"{path}: too large for a space file ({path.stat().st_size} bytes)")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SpaceError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise SpaceError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        return read_yaml(text)
    except YamlError as error:
        line = f", line {error.line}" if error.line else ""
        raise SpaceError(f"{path}{line}: {error.rule}") from error


def _apply(content: dict[str, Any], overrides: Sequence[str]) -> dict[str, str]:
    """Set the overridden fields in `content`; return where each came from."""
    sources: dict[str, str] = {}
    for override in overrides:
        field, equals, text = override.partition("=")
        keys = [key.strip() for key in field.split(".")]
        if not equals or not all(keys):
            raise SpaceError(f"--set {override}: must be FIELD=VALUE, such as search.trials=6")
        try:
            value = read_yaml(text)
        except YamlError as error:
            raise SpaceError(f"--set {override}: {error.rule}") from error
        _require_known(override, keys)
        _set(content, keys, value, override)
        sources[".".join(keys)] = f"--set {override}"
    return sources


def _require_known(override: str, keys: list[str]) -> None:
    """Refuse a field that no space file has, before it is set."""
    model: Any = SearchSpec
    for depth, key in enumerate(keys):
        if isinstance(model, type) and issubclass(model, BaseModel):
            allowed = list(model.model_fields)
            following: Any = (
                _section(model.model_fields[key].annotation) if key in allowed else None
            )
        elif keys[0] == "space" and depth == 1:
            allowed, following = list(HYPERPARAMETERS), None
        elif keys[0] == "space" and depth == 2:
            allowed, following = list(ENTRY_KEYS), None
        else:
            raise SpaceError(f"--set {override}: {'.'.join(keys[:depth])} has no fields of its own")
        if key not in allowed:
            raise SpaceError(
                f"--set {override}: {'.'.join(keys[: depth + 1])}: {unknown_key(key, allowed)}"
            )
        model = following


def _set(content: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    place = content
    for depth, key in enumerate(keys[:-1], start=1):
        inner = place.setdefault(key, {})
        if key == "pretrain" and isinstance(inner, str):
            inner = place[key] = {"source": inner}
        if inner is None:
            inner = place[key] = {}
        if not isinstance(inner, dict):
            name = ".".join(keys[:depth])
            raise SpaceError(
                f"--set {override}: {name} is {_show(inner)} here, which has no {keys[depth]!r}; "
                f"set it whole, such as {name}={{low: 1, high: 4}}"
            )
        place = inner
    place[keys[-1]] = value


def _problems(detail: Any) -> list[Problem]:
    """Turn one error of pydantic into problems in our words."""
    context = detail.get("ctx") or {}
    if "problems" in context:
        return list(context["problems"])
    field = ""
    for part in detail["loc"]:
        if isinstance(part, int):
            field += f"[{part}]"
        elif part.isidentifier() or not field:
            field += f".{part}" if field else str(part)
    return [Problem(field, detail["input"], _rule(detail, context))]


def _rule(detail: Any, context: Mapping[str, Any]) -> str:
    kind = detail["type"]
    if kind == "extra_forbidden":
        return unknown_key(str(detail["loc"][-1]), _allowed(detail["loc"][:-1]))
    if kind == "literal_error":
        return f"must be one of {context['expected']}"
    if kind in _RULES:
        return _RULES[kind].format(**context)
    # What our own validators raise says the rule itself.
    message: str = detail["msg"]
    return message.removeprefix("Value error, ")


_RULES: Mapping[str, str] = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "tuple_type": "must be a list",
    "missing": "is missing",
    "too_long": "must have {max_length} values",
    "too_short": "must have at least {min_length} values",
    "model_type": "must be a section, with one field per line",
    "model_attributes_type": "must be a section, with one field per line",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
}


def _allowed(location: Sequence[Any]) -> list[str]:
    model: Any = SearchSpec
    for part in location:
        model = _section(model.model_fields[part].annotation)
    return list(model.model_fields)


def _section(annotation: Any) -> Any:
    """Return the type that an annotation names beside None."""
    return next((each for each in get_args(annotation) if isinstance(each, type)), annotation)


def _source(field: str, sources: Mapping[str, str]) -> str | None:
    """The override that a field, or the value that it is part of, came from."""
    for name, source in reversed(list(sources.items())):
        if field == name or field.startswith((f"{name}.", f"{name}[")):
            return source
    return None


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
