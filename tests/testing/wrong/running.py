"""Running one check of the kit on a plugin, in this process."""

from __future__ import annotations

import inspect
import itertools

import pytest
from toys import registered

from tunerkit.testing import MethodConformance
from tunerkit.testing.bench import Bench

CHECKS = sorted(name for name in dir(MethodConformance) if name.startswith("test_"))


def findings(plugin, check, sample, folder, fixture):
    """Yield what a check finds, once for each of its parameters: an error, why it is skipped, or None.

    Args:
        plugin: The plugin.
        check: The name of the check.
        sample: The name of the kit's model.
        folder: An empty folder.
        fixture: Gives what the check asks pytest for, by name.
    """

    class Case(MethodConformance):
        def config(self):
            return plugin.Config()

    function = getattr(Case(), check)
    asked = [name for name in inspect.signature(function).parameters if name != "bench"]
    marks = [mark.args for mark in getattr(function, "pytestmark", ()) if mark.name == "parametrize"]
    fixtures = {name: fixture(name) for name in asked if name not in {name for name, _ in marks}}
    for number, values in enumerate(itertools.product(*(choices for _, choices in marks))):
        place = folder / str(number)
        place.mkdir(parents=True)
        given = dict(zip((name for name, _ in marks), values, strict=True))
        try:
            with registered(plugin):
                function(Bench(Case(), sample, place), **given, **fixtures)
        except (Exception, pytest.skip.Exception) as error:  # noqa: BLE001 - whatever is wrong with it
            yield error
        else:
            yield None
