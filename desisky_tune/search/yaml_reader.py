"""YAML as a space file means it: no key twice, and ``1e-4`` is a number."""

from __future__ import annotations

import re
from typing import Any

import yaml

#: YAML 1.1 takes ``1e-4`` for text, because it has no dot; this is the form of YAML 1.2.
_FLOAT = re.compile(
    r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+|[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)


class YamlError(ValueError):
    """A text is not YAML, or names a key twice; `line` counts from 1."""

    def __init__(self, rule: str, line: int | None) -> None:
        super().__init__(rule)
        self.rule = rule
        self.line = line


class _Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` with the two rules of this module."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise YamlError(f"key {key!r} must be text", line)
            if key in seen:
                raise YamlError(f"key {key!r} stands twice", line)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:float",)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(rf"^(?:{_FLOAT.pattern})$"), [*"-+0123456789."]
)


def read_yaml(text: str) -> Any:
    """Return what a YAML text holds.

    Raises
    ------
    YamlError
        With the line, when it is not YAML or a key stands twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = error.problem or error.context or "unreadable"
        raise YamlError(f"not valid YAML: {what}", mark.line + 1 if mark else None) from error
    except yaml.YAMLError as error:
        raise YamlError(f"not valid YAML: {str(error).splitlines()[0]}", None) from error
    except RecursionError:
        raise YamlError("not valid here: nested too deeply", None) from None
