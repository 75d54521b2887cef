"""What the keys of a checkpoint's tensors say: which modules they belong to, and what they hold of each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunerkit.checkpoint.state import PREFIX

if TYPE_CHECKING:
    from collections.abc import Collection

    from tunerkit.plugins import LoadedMethod

_WHOLE = PREFIX.partition(".")[0]


@dataclass(frozen=True)
class Owner:
    """The module that a tensor of a checkpoint belongs to.

    Attributes:
        path: The module's path in the base model; empty for what the whole model shares.
        entry: The name under which the adapter holds it, or the parameter's name if it replaces one.
        replaces: Whether it is a parameter of the base model's own, trained as a whole.
    """

    path: str
    entry: str
    replaces: bool = False


def entries_of(method: LoadedMethod | None) -> frozenset[str]:
    """Return the names under which a method's adapters hold their tensors; none if the method is not known."""
    declared = None if method is None else method.method
    if declared is None:
        return frozenset()
    return frozenset((*declared.entries, *(declared.part.entries if declared.part is not None else ())))


def owner_of(key: str, entries: Collection[str], whole: Collection[str] = ()) -> Owner:
    """Return the module that a tensor belongs to.

    Where the method is not known, the key's form must do: the path, the entry's name, and then perhaps `weight`.

    Args:
        key: The tensor's key.
        entries: The names of the method's entries; none if the method is not known.
        whole: The names of modules that the config says are trained as a whole.
    """
    below = key.replace("_orig_mod.", "")
    shared = below.startswith(f"{_WHOLE}.") and not below.startswith(PREFIX)
    below = below.removeprefix(f"{_WHOLE}." if shared else PREFIX)
    parts = below.split(".")
    at = next((index for index in reversed(range(len(parts))) if parts[index] in entries), None)
    if at is not None:
        return Owner(_module(parts[:at]), parts[at])
    if entries or len(parts) == 1 or any(f".{name}." in f".{below}." for name in whole):
        return Owner(_module(parts[:-1]), parts[-1], replaces=not shared)
    end = -2 if parts[-1] in ("weight", "bias") else -1
    return Owner(_module(parts[:end]), parts[end])


def _module(parts: list[str]) -> str:
    """Return a module's path; layers that adapt several parameters of one module stand on one another."""
    path = ".".join(parts)
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path


def by_number(path: str) -> str:
    """Return a path with `*` for its numbers."""
    return re.sub(r"\b\d+\b", "*", path)
