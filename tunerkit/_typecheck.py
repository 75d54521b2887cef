"""Whether a value has the type that an annotation asks for, and the annotation in words.

Settings come from users and from JSON, so the check follows what those mean: `True` is not a number, a whole number is
a float, and a list may stand for a set or a tuple.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, Literal, Union

_WHOLE = 2**63
"""JSON's whole numbers have no end, and those of all that counts or computes with a setting do."""

_COLLECTIONS = (list, set, tuple, frozenset)


def fits(value: Any, annotation: Any) -> bool:
    """Return whether `value` is what `annotation` describes."""
    if annotation is Any:
        return True
    if annotation is None or annotation is type(None):
        return value is None
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return any(value == argument and type(value) is type(argument) for argument in arguments)
    if origin is dict:
        return isinstance(value, dict) and all(
            fits(key, arguments[0]) and fits(item, arguments[1]) for key, item in value.items()
        )
    if origin is tuple and arguments[1:] != (...,):
        return (
            isinstance(value, (list, tuple))
            and len(value) == len(arguments)
            and all(fits(item, argument) for item, argument in zip(value, arguments, strict=True))
        )
    if origin in _COLLECTIONS:
        return isinstance(value, _COLLECTIONS) and all(fits(item, arguments[0]) for item in value)
    return _is_instance(value, annotation if origin is None else origin)


def _is_instance(value: Any, kind: type) -> bool:
    if kind in (int, float) and isinstance(value, bool):
        return False
    if isinstance(value, int) and kind in (int, float):
        return abs(value) < _WHOLE
    if kind is float:
        return isinstance(value, float) and math.isfinite(value)
    return isinstance(value, kind)


def describe(annotation: Any) -> str:
    """Return an annotation in words, for an error message."""
    if annotation is None or annotation is type(None):
        return "None"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(argument) for argument in arguments))
    if origin is Literal:
        return " or ".join(repr(argument) for argument in arguments)
    if origin is dict:
        return f"a dict of {describe(arguments[0])} to {describe(arguments[1])}"
    if origin is tuple and arguments[1:] != (...,):
        return "a sequence of " + ", ".join(describe(argument) for argument in arguments)
    if origin in _COLLECTIONS:
        return f"a list of {describe(arguments[0])}"
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return f"a {annotation.__name__}"
    names = {
        bool: "True or False",
        int: "a whole number",
        float: "a finite number",
        str: "text",
        dict: "a dict",
        Any: "anything",
    }
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))
