"""Runs the kit on a method that is installed, as `tunerkit check` does."""

from __future__ import annotations

import contextlib
import importlib
import io
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tunerkit.errors import PluginError
from tunerkit.plugins import get_method
from tunerkit.testing.conformance import MethodConformance
from tunerkit.testing.failures import Failure, check_of, findings
from tunerkit.testing.summary import outcome_of, reason_of

if TYPE_CHECKING:
    from tunerkit.testing.failures import Finding
    from tunerkit.testing.summary import Outcome

_MODULE = "from tunerkit.testing.installed import case_of\n\nTestMethod = case_of({method!r})\n"


@dataclass
class Result:
    """How one check went.

    Attributes:
        outcomes: For each outcome, how often, over the kinds of sites and the variants of the check.
        reasons: Why it was left out or expected to fail, each reason once.
    """

    outcomes: dict[Outcome, int] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    def add(self, outcome: Outcome, reason: str) -> None:
        """Count one outcome."""
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        if reason and reason not in self.reasons:
            self.reasons.append(reason)


def case_of(name: str) -> type[MethodConformance]:
    """Return the class of checks for an installed method: the one that its plugin names, or one with default settings.

    Args:
        name: The method's name.

    Raises:
        PluginError: There is no such class.
    """
    method = get_method(name).method
    if method.conformance is not None:
        return _named(name, method.conformance)
    return type("TestMethod", (MethodConformance,), {"config": lambda _: method.config()})


def _named(method: str, where: str) -> type[MethodConformance]:
    module, _, attribute = where.partition(":")
    try:
        found: object = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"
    if isinstance(found, type) and issubclass(found, MethodConformance):
        return found
    msg = (
        f"The plugin of {method!r} says conformance={where!r}, which must be 'module:Class' of a MethodConformance; "
        f"found {found!r}. Mend it, or leave it out to check with the default settings."
    )
    raise PluginError(msg)


def check(name: str) -> tuple[dict[str, Result], list[Finding], str]:
    """Run the kit on an installed method.

    Args:
        name: The method's name.

    Returns:
        How each check went, by name; what those that failed have found, the most basic first; and what pytest printed.
    """
    case_of(name)  # so that it is refused here, and not where pytest collects it
    recorder, printed = _Recorder(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(printed):
        # Named anew each time, or Python would take it for the module of the run before.
        file = Path(folder) / f"test_{Path(folder).name}.py"
        file.write_text(_MODULE.format(method=name), encoding="utf-8")
        empty = Path(folder) / "pytest.ini"
        empty.write_text("[pytest]\n", encoding="utf-8")  # so that the settings of where one stands do not count
        pytest.main([str(file), "-c", str(empty), "-p", "no:cacheprovider", "--tb=short", "-q"], plugins=[recorder])
    return recorder.results, findings(recorder.failures), printed.getvalue()


class _Recorder:
    """A pytest plugin that takes down how each check went."""

    def __init__(self) -> None:
        self.results: dict[str, Result] = {}
        self.failures: list[Failure] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        outcome = outcome_of(report)
        if outcome is not None:
            self.results.setdefault(check_of(report), Result()).add(outcome, reason_of(report))
        if outcome == "failed":
            self.failures.append(Failure.of(report))
