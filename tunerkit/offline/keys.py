"""What the keys of a checkpoint's tensors say: which modules they belong to, and what they hold of each."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunerkit.layer import BaseTunerLayer
from tunerkit.naming import PREFIX, uncompiled

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from tunerkit.plugins import LoadedMethod

_WHOLE = PREFIX.partition(".")[0]


@dataclass(frozen=True)
class Owner:
    """The module that a tensor of a checkpoint belongs to.

    Attributes:
        path: The module's path in the base model, as far as it follows from the keys; empty for what the whole model
            shares.
        entry: The name under which the adapter holds it, or the parameter's name if it replaces one.
        replaces: Whether it is a parameter of the base model's own, trained as a whole.
    """

    path: str
    entry: str
    replaces: bool = False


def owners_of(keys: Iterable[str], method: LoadedMethod | None, whole: object = ()) -> dict[str, Owner]:
    """Return the module that each tensor of a checkpoint belongs to, by key.

    Args:
        keys: The keys.
        method: The checkpoint's method; None if it is not known.
        whole: What the config has under `modules_to_save`; anything but a list of names says nothing.
    """
    entries: frozenset[str] = frozenset()
    if method is not None:
        declared = method.method
        entries = frozenset((*declared.entries, *(declared.part.entries if declared.part is not None else ())))
    names = whole if isinstance(whole, (list, tuple)) else ()
    found = {key: owner_of(key, entries, names) for key in keys}
    paths = {owner.path for owner in found.values()}
    return {key: dataclasses.replace(owner, path=_in_base(owner.path, paths)) for key, owner in found.items()}


def owner_of(key: str, entries: Collection[str], whole: Collection[str] = ()) -> Owner:
    """Return the module that a tensor belongs to, by the path that it has in the key.

    Where the method is not known, the key's form must do: the path, the entry's name, and then perhaps `weight`.

    Args:
        key: The tensor's key.
        entries: The names of the method's entries; none if the method is not known.
        whole: The names of modules that the config says are trained as a whole.
    """
    below = uncompiled(key)
    shared = below.startswith(f"{_WHOLE}.") and not below.startswith(PREFIX)
    below = below.removeprefix(f"{_WHOLE}." if shared else PREFIX)
    parts = below.split(".")
    at = next((index for index in reversed(range(len(parts))) if parts[index] in entries), None)
    if at is not None:
        return Owner(".".join(parts[:at]), parts[at])
    if entries or len(parts) == 1 or any(f".{name}." in f".{below}." for name in whole):
        return Owner(".".join(parts[:-1]), parts[-1], replaces=not shared)
    end = -2 if parts[-1] in ("weight", "bias") else -1
    return Owner(".".join(parts[:end]), parts[end])


def _in_base(path: str, paths: Collection[str]) -> str:
    """Return a path without the names under which layers hold what they stand on.

    Only below the path of another layer is it such a name; elsewhere a module of the base model is called that.
    """
    parts = path.split(".")
    above = [".".join(parts[:index]) for index in range(len(parts))]
    kept = zip(parts, above, strict=True)
    return ".".join(part for part, upper in kept if part != BaseTunerLayer.base_name or upper not in paths)


def by_number(path: str) -> str:
    """Return a path with `*` for its numbers."""
    return re.sub(r"\b\d+\b", "*", path)
