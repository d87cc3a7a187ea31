"""Conditions that a space file states, such as ``width * depth <= 1024``.

A condition is read once into a tree of arithmetic, comparisons, `and`, `or` and `not`; what is
a word can only be compared with one, as in ``schedule == 'cosine'``;
whatever else Python would understand (calls, attributes, subscripts, powers) is refused.
Nothing is ever handed to an interpreter.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

#: Characters that a condition may have: it is a line, not a program.
LONGEST = 200

_ARITHMETIC: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: Mapping[type, Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


@dataclass(frozen=True)
class Condition:
    """A condition on hyperparameters. Made by `read_condition`.

    Attributes
    ----------
    text
        As it was written.
    """

    text: str

    @property
    def names(self) -> frozenset[str]:
        """What it speaks of."""
        return frozenset(n.id for n in ast.walk(_tree(self.text)) if isinstance(n, ast.Name))

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether it is true of `values`; a division by zero is not.

        Parameters
        ----------
        values
            A number, or a word, for each of `names`.
        """
        try:
            return bool(_value(_tree(self.text), values))
        except ZeroDivisionError:
            return False


def read_condition(text: str, names: Collection[str], words: Collection[str] = ()) -> Condition:
    """Read a condition.

    Parameters
    ----------
    text
        As a space file has it.
    names
        What it may speak of.
    words
        Which of `names` are words, not numbers.

    Raises
    ------
    ValueError
        With the rule that it breaks.
    """
    rule = f"must compare {', '.join(names)} and numbers, such as 'width * depth <= 1024'"
    if len(text) > LONGEST:
        raise ValueError(f"must have at most {LONGEST} characters")
    try:
        tree = _tree(text)
    except (SyntaxError, ValueError) as error:
        raise ValueError(rule) from error
    if not _is_logical(tree):
        raise ValueError(rule)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id not in names:
            raise ValueError(f"{node.id!r} is not known here; {rule}")
    if not _allowed(tree, frozenset(words), logical=True):
        raise ValueError(f"{rule}, with + - * / // % ( ) and, or, not")
    return Condition(text)


@lru_cache(maxsize=256)
def _tree(text: str) -> ast.expr:
    return ast.parse(text.strip(), mode="eval").body


def _is_logical(node: ast.expr) -> bool:
    return isinstance(node, ast.Compare | ast.BoolOp) or (
        isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    )


def _allowed(node: ast.expr, words: frozenset[str], *, logical: bool) -> bool:
    """Whether a node, and all below it, is of the few kinds; numbers and truths do not mix."""
    if logical != _is_logical(node):
        return False
    match node:
        case ast.BoolOp(values=values):
            return all(_allowed(each, words, logical=True) for each in values)
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            return _allowed(inner, words, logical=True)
        case ast.Compare(left=left, ops=ops, comparators=others):
            if any(_is_word(each, words) for each in (left, *others)):
                same = all(isinstance(op, ast.Eq | ast.NotEq) for op in ops)
                return same and all(_is_word(each, words) for each in (left, *others))
            known = all(type(op) in _COMPARISONS for op in ops)
            return known and all(_allowed(each, words, logical=False) for each in (left, *others))
        case ast.BinOp(left=left, op=op, right=right):
            known = type(op) in _ARITHMETIC
            return known and all(_allowed(each, words, logical=False) for each in (left, right))
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return _allowed(inner, words, logical=False)
        case ast.Constant(value=value):
            return isinstance(value, int | float) and not isinstance(value, bool)
        case ast.Name(id=name):
            return name not in words
    return False


def _is_word(node: ast.expr, words: frozenset[str]) -> bool:
    match node:
        case ast.Constant(value=str()):
            return True
        case ast.Name(id=name):
            return name in words
    return False


def _value(node: ast.expr, values: Mapping[str, Any]) -> Any:
    match node:
        case ast.BoolOp(op=ast.And(), values=parts):
            return all(_value(each, values) for each in parts)
        case ast.BoolOp(values=parts):
            return any(_value(each, values) for each in parts)
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            return not _value(inner, values)
        case ast.UnaryOp(operand=inner):
            return -_value(inner, values)
        case ast.Compare(left=left, ops=ops, comparators=others):
            terms = [_value(each, values) for each in (left, *others)]
            pairs = zip(ops, terms[:-1], terms[1:], strict=True)
            return all(_COMPARISONS[type(op)](low, high) for op, low, high in pairs)
        case ast.BinOp(left=left, op=op, right=right):
            return _ARITHMETIC[type(op)](_value(left, values), _value(right, values))
        case ast.Name(id=name):
            return values[name]
        case ast.Constant(value=value):
            return value
    raise AssertionError(f"{ast.dump(node)} passed the check of a condition")
