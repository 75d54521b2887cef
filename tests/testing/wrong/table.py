"""`Wrong`: a plugin that is wrong, the right one that it is a few lines away from, and the checks that catch it."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

from tunerkit.adapter import Adapter, Part
from tunerkit.config import PeftConfig
from tunerkit.errors import TunerkitError

WRONG = []


@dataclass(frozen=True)
class Wrong:
    """A wrong plugin: a class that changes a few lines of a right method's, and says in its docstring what is wrong.

    The class is an adapter, a config, a part, or a whole plugin with hooks. The right one is the class's base.

    Attributes:
        kind: The class.
        checks: The names of the checks of the kit that must catch it.
        sample: The name of the kit's model that it is caught on; that of the first kind that the right one adapts, if
            this is not set.
        error: What the checks fail with.
        declared: Whether the right method declares that it cannot do what is checked, so that the check is skipped.
    """

    kind: type
    checks: tuple[str, ...]
    sample: str | None = None
    error: type[Exception] | tuple[type[Exception], ...] = (AssertionError, TunerkitError)
    declared: bool = False

    def __str__(self):
        return self.kind.__name__

    @property
    def fault(self):
        return " ".join(inspect.getdoc(self.kind).split())

    @property
    def base(self):
        [base] = self.kind.__bases__
        return base

    @property
    def place(self):
        """The name of the kit's model that it is run on."""
        return self.sample or self.usual_place

    @property
    def usual_place(self):
        """The name of the kit's model that the right one is run on."""
        return min(self.right.method.kinds, default="linear")

    @property
    def plugin(self):
        return plugin_with(self.kind, sys.modules[self.base.__module__])

    @property
    def right(self):
        return plugin_with(self.base, sys.modules[self.base.__module__])


def caught_by(*checks, **more):
    """Enter a class in the table of wrong plugins."""

    def enter(kind):
        WRONG.append(Wrong(kind, checks, **more))
        return kind

    return enter


def plugin_with(kind, toy):
    """Return the plugin of a toy method with one class in place of the toy's own."""
    for base, field in ((Adapter, "adapter"), (PeftConfig, "config"), (Part, "part")):
        if issubclass(kind, base):
            method = replace(toy.method, **{field: kind})
            return SimpleNamespace(method=method, Config=method.config)
    return kind()
