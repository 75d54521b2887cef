"""The spellings of a method's name, the rules for adapter names, paths in keys, and names in error messages."""

from __future__ import annotations

import difflib
import functools
import re
import unicodedata
from typing import TYPE_CHECKING

from tunerkit.errors import AdapterNameError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

PREFIX = "base_model.model."
"""What stands before the paths of the base model's modules in a checkpoint's keys."""

COMPILED = "_orig_mod"
"""The name under which what `torch.compile` returns holds the module."""

_METHOD_ID = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
_MAX_ADAPTER_NAME = 100
_SHOWN = 200
_BITS = 64


@functools.lru_cache(maxsize=256)
def method_id(name: str) -> str:
    """Return the id of a method from any of its spellings.

    `ln-tuning` (the id), `tunerkit-ln-tuning` (the package), `tunerkit_ln_tuning` (the module) and `LN_TUNING` (the
    `peft_type`) all name the same method.

    Raises:
        ConfigError: The text is not a spelling of any method's name.
    """
    text = str(name).strip().lower().replace("_", "-").removeprefix("tunerkit-")
    if len(text) > _MAX_ADAPTER_NAME or not _METHOD_ID.fullmatch(text):
        msg = f"{shown(name)} is not a method name: use letters, digits and single hyphens."
        raise ConfigError(msg)
    return text


def package_name(method: str) -> str:
    """Return the name of the package that offers a method: `tunerkit-ln-tuning`."""
    return f"tunerkit-{method_id(method)}"


def module_name(method: str) -> str:
    """Return the import name of a method's package: `tunerkit_ln_tuning`."""
    return package_name(method).replace("-", "_")


def peft_type_name(method: str) -> str:
    """Return what stands as `peft_type` in a checkpoint's config: `LN_TUNING`."""
    return method_id(method).replace("-", "_").upper()


def uncompiled(path: str) -> str:
    """Return the path of a module, or a tensor's key, as it is where nothing is compiled."""
    if COMPILED not in path:  # in no part of it: most models are not compiled, and a long one has many keys
        return path
    return ".".join(part for part in path.split(".") if part != COMPILED)


def check_adapter_name(name: object, reserved: Iterable[str] = ()) -> str:
    """Return `name` if an adapter may be called that.

    Args:
        name: The name to check.
        reserved: Names that are taken by the containers in which PEFT's users find adapters.

    Raises:
        AdapterNameError: The name is not a string, empty, too long, holds a character that separates parts of a
            parameter's name or of a path, or is reserved.
    """
    if not isinstance(name, str):
        msg = f"An adapter name is a string; {name!r} is of type {type(name).__name__}."
        raise AdapterNameError(msg)
    if not name or len(name) > _MAX_ADAPTER_NAME:
        msg = f"An adapter name has 1 to {_MAX_ADAPTER_NAME} characters; {name[:20]!r} has {len(name)}."
        raise AdapterNameError(msg)
    bad = sorted({char for char in name if char in "./\\" or unicodedata.category(char).startswith("C")})
    if bad:
        found = ", ".join(map(repr, bad))
        msg = (
            f"The adapter name {name!r} holds {found}. Dots separate the parts of a parameter's name and slashes those "
            "of a path: use letters, digits, spaces, '-' or '_'."
        )
        raise AdapterNameError(msg)
    if name in reserved:
        msg = (
            f"{name!r} cannot be an adapter name: it is an attribute of the containers that hold adapters "
            f"(torch.nn.ModuleDict), so `layer.<entry>.{name}` would not mean the adapter. Choose another, such as "
            f"'{name}_1'."
        )
        raise AdapterNameError(msg)
    return name


def closest(name: str, possible: Iterable[str], count: int = 3, cutoff: float = 0.5) -> list[str]:
    """Return up to `count` of the possible names that look like `name`, best first; `cutoff` 1 asks for the same."""
    return difflib.get_close_matches(name, list(dict.fromkeys(possible)), n=count, cutoff=cutoff)


def listing(names: Iterable[object], limit: int = 8) -> str:
    """Return names as text for a message: quoted, separated by commas, the rest counted."""
    items = [shown(str(name)) for name in names]
    text = ", ".join(items[:limit]) or "none"
    return f"{text} and {len(items) - limit} more" if len(items) > limit else text


def shown(value: object) -> str:
    """Return a value as text for a message, which a file's content must not make longer than anybody reads."""
    if isinstance(value, int) and value.bit_length() > _BITS:
        return f"a number of {value.bit_length()} bits, of which {_BITS - 1} fit,"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


def given_names(given: object, known: Iterable[str]) -> list[str]:
    """Return what a caller passed as one name or several, each once.

    Raises:
        AdapterNameError: It is something else; the message lists the known names.
    """
    if not isinstance(given, (str, list, tuple, set, dict)):
        msg = (
            f"The adapter is given by its name, or by a list of names; it is {given!r} of type "
            f"{type(given).__name__}. The model has {listing(known)}."
        )
        raise AdapterNameError(msg)
    return [given] if isinstance(given, str) else list(dict.fromkeys(given))
