"""Runs the kit on a method that is installed, as `tunerkit check` does."""

from __future__ import annotations

import contextlib
import importlib
import io
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from tunerkit.plugins import get_method
from tunerkit.testing.conformance import MethodConformance

_MODULE = "from tunerkit.testing.installed import case_of\n\nTestMethod = case_of({method!r})\n"

Outcome = Literal["passed", "failed", "absent", "expected to fail", "does not apply"]


@dataclass
class Result:
    """How one check went.

    Attributes:
        outcomes: For each outcome, how often, over the kinds of sites and the variants of the check.
        reasons: Why it failed or was left out, each reason once.
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
    """
    method = get_method(name).method
    if method.conformance is not None:
        module, _, attribute = method.conformance.partition(":")
        found: type[MethodConformance] = getattr(importlib.import_module(module), attribute)
        return found
    return type("TestMethod", (MethodConformance,), {"config": lambda _: method.config()})


def check(name: str) -> tuple[dict[str, Result], str]:
    """Run the kit on an installed method.

    Args:
        name: The method's name.

    Returns:
        How each check went, by name, and what pytest printed.
    """
    recorder, printed = _Recorder(case_of(name)), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(printed):
        # Named anew each time, or Python would take it for the module of the run before.
        file = Path(folder) / f"test_{Path(folder).name}.py"
        file.write_text(_MODULE.format(method=name), encoding="utf-8")
        empty = Path(folder) / "pytest.ini"
        empty.write_text("[pytest]\n", encoding="utf-8")  # so that the settings of where one stands do not count
        pytest.main([str(file), "-c", str(empty), "-p", "no:cacheprovider", "--tb=short", "-q"], plugins=[recorder])
    return recorder.results, printed.getvalue()


class _Recorder:
    """A pytest plugin that takes down how each check went."""

    def __init__(self, case: type[MethodConformance]) -> None:
        self.case = case
        self.results: dict[str, Result] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            name = report.location[2].partition("[")[0].rpartition(".")[2]
            self.results.setdefault(name, Result()).add(*self._outcome(name, report))

    def _outcome(self, name: str, report: pytest.TestReport) -> tuple[Outcome, str]:
        if hasattr(report, "wasxfail"):
            return "expected to fail", self.case.xfail.get(name, report.wasxfail)
        if report.skipped:
            if name in self.case.absent:
                return "absent", self.case.absent[name]
            return "does not apply", str(report.longrepr[2]).removeprefix("Skipped: ") if report.longrepr else ""  # type: ignore[index]
        if report.failed:
            return "failed", report.longreprtext.strip().splitlines()[-1]
        return "passed", ""
