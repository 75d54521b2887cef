"""What a method can do, gathered from what its classes declare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tunerkit.plugins.method import Method

Ability = Literal["merge", "merge out of order", "rows"]

_DEPENDS = "what one changes depends on those below it"
_SURROUNDS = "it does something around a call of the whole model"


@dataclass(frozen=True)
class Absence:
    """Something that adapters of a method cannot do.

    Attributes:
        what: `"merge"`, `"merge out of order"` (of several active adapters, one before those below it), or `"rows"` (of
            one batch, with adapters of their own).
        why: The reason that is declared.
        classes: The names of the classes that declare it.
    """

    what: Ability
    why: str
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Capabilities:
    """What the adapters of a method can do, as its classes declare it; an adapter may know better of a single layer.

    Attributes:
        kinds: The kinds of sites that it adapts (`Adapter.kinds`); none if the plugin makes its layers itself.
        shares: Whether an adapter has something in common at all its sites (`Method.part`).
        absent: What its adapters cannot do (`Adapter.unfoldable`, `commutes` and `crosses_rows`, and `Part.around`).
    """

    kinds: tuple[str, ...]
    shares: bool
    absent: tuple[Absence, ...]

    @classmethod
    def of(cls, method: Method) -> Capabilities:
        """Return what a method can do."""
        classes: dict[tuple[Ability, str], list[str]] = {}
        for what, why, name in _absences(method):
            classes.setdefault((what, why), []).append(name)
        absent = (Absence(what, why, tuple(names)) for (what, why), names in classes.items())
        return cls(tuple(sorted(method.kinds)), method.part is not None, tuple(absent))


def _absences(method: Method) -> Iterator[tuple[Ability, str, str]]:
    for adapter in method.adapters:
        name = adapter.__name__
        # A class may leave it to each adapter, by a property.
        if isinstance(adapter.unfoldable, str):
            yield "merge", adapter.unfoldable, name
        elif not adapter.commutes:
            yield "merge out of order", _DEPENDS, name
        if isinstance(adapter.crosses_rows, str):
            yield "rows", adapter.crosses_rows, name
    if method.part is not None and method.part.surrounds():
        yield "rows", _SURROUNDS, method.part.__name__
