"""What a config's field may be beyond its type, as it is declared with the field."""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import MISSING, dataclass, field
from typing import Any

from tunerkit.errors import ConfigError

_RULE = "tunerkit"


@dataclass(frozen=True)
class Rule:
    """What a setting may be, beyond its type."""

    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    built: bool = True
    saved: bool = True

    def check_range(self, where: str, value: Any) -> None:
        """Raise `ConfigError` if a value is out of range; `where` names the field."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return
        bounds = (
            (self.minimum, "at least", operator.ge),
            (self.above, "above", operator.gt),
            (self.maximum, "at most", operator.le),
        )
        for bound, phrase, holds in bounds:
            if bound is not None and not holds(value, bound):
                msg = f"{where} must be {phrase} {bound:g}; it is {value!r}."
                raise ConfigError(msg)


def setting(
    default: Any = MISSING,
    *,
    factory: Any = MISSING,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    saved: bool = True,
) -> Any:
    """Declare a field of a config together with what it may be.

    Args:
        default: The default value.
        factory: What makes the default, for values that can change.
        minimum: The smallest number allowed.
        above: A number that the value must exceed.
        maximum: The largest number allowed.
        saved: Whether the setting is written into the checkpoint's config.
    """
    rule = Rule(minimum=minimum, above=above, maximum=maximum, saved=saved)
    return _field(default, factory, rule)


def unbuilt(default: Any = MISSING, *, factory: Any = MISSING, saved: bool = True) -> Any:
    """Declare a field that PEFT has and this package has not built: known, and refused away from its default.

    Args:
        default: The default value.
        factory: What makes the default, for values that can change.
        saved: Whether the setting is written into the checkpoint's config.
    """
    return _field(default, factory, Rule(built=False, saved=saved))


def _field(default: Any, factory: Any, rule: Rule) -> Any:
    if factory is not MISSING:
        return field(default_factory=factory, metadata={_RULE: rule})
    return field(default=default, metadata={_RULE: rule})


def rule_of(item: dataclasses.Field[Any]) -> Rule:
    """Return what a field may be."""
    rule: Rule = item.metadata.get(_RULE, Rule())
    return rule


def is_unbuilt(item: dataclasses.Field[Any], value: Any) -> bool:
    """Return whether a value asks a field for something that is not built."""
    return not rule_of(item).built and value != default_of(item) and not _says_nothing(value)


def default_of(item: dataclasses.Field[Any]) -> Any:
    """Return a field's default value."""
    return item.default_factory() if item.default_factory is not MISSING else item.default


def _says_nothing(value: Any) -> bool:
    # Of a known field 0 and False are requests: `layers_to_transform=0` is the first layer.
    return is_empty(value) and value != 0


def is_empty(value: Any) -> bool:
    """Return whether a value is empty or off."""
    # 0.0 and False are "off" in PEFT's configs, as are empty containers.
    return value is None or value in (False, 0, "", [], {}) or (isinstance(value, (set, tuple)) and not value)
