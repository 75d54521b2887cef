"""What the kit prints at the end of a pytest run: how many checks ran, what was left out, and what to mend first.

It prints by itself, but for a run by pytest-xdist: there other processes collect the checks. For those, name it in the
`conftest.py` at the root: `pytest_plugins = ["tunerkit.testing.summary"]`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Literal, NoReturn

import pytest

from tunerkit.testing.failures import Failure, findings

Outcome = Literal["passed", "failed", "absent", "expected to fail", "does not apply"]

_NAME = "tunerkit-conformance"
_CASE, _ABSENT = "conformance", "absent"


class Summary:
    """A pytest plugin, which the kit registers when its first checks are collected."""

    def __init__(self) -> None:
        self.counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.failures: defaultdict[str, list[Failure]] = defaultdict(list)

    @classmethod
    def register(cls, config: pytest.Config) -> None:
        """Take part in this run, if it does not yet."""
        if not config.pluginmanager.has_plugin(_NAME):
            config.pluginmanager.register(cls(), _NAME)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a check of the kit's by how it went."""
        case, outcome = dict(report.user_properties).get(_CASE), outcome_of(report)
        if case is not None and outcome is not None:
            self.counts[str(case)][outcome] += 1
            if outcome == "failed":
                self.failures[str(case)].append(Failure.of(report))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print a line for each class of checks, and below it with what to begin where some failed."""
        if self.counts:
            terminalreporter.section("conformance")
        for case, count in sorted(self.counts.items()):
            terminalreporter.write_line(
                f"{case}: {count['passed'] + count['failed']} checks ran, {count['absent']} were declared absent, "
                f"{count['expected to fail']} failed as expected, {count['does not apply']} did not apply"
            )
            found = findings(self.failures[case])
            if found:
                more = f" (what else was found may follow from it: {len(found) - 1} more)" if len(found) > 1 else ""
                terminalreporter.write_line(f"  {count['failed']} failed. Begin with {found[0].title}{more}:")
            for line in found[0].lines() if found else ():
                terminalreporter.write_line(f"    {line}")


def pytest_configure(config: pytest.Config) -> None:
    """Take part from the start where this module itself is named as a plugin."""
    Summary.register(config)


def note(item: pytest.Item, case: str) -> None:
    """Let the summary know that a test is a check of a class."""
    item.user_properties.append((_CASE, case))


def leave_out(item: pytest.Item, reason: str) -> NoReturn:
    """Skip a check, because what it checks is declared absent."""
    item.user_properties.append((_ABSENT, reason))
    pytest.skip(f"declared absent: {reason}")


def outcome_of(report: pytest.TestReport) -> Outcome | None:
    """Return how a check of the kit went; None if the report is of what surrounds it, where nothing went wrong."""
    if report.when != "call" and report.passed:
        return None
    if hasattr(report, "wasxfail"):
        return "expected to fail"
    if report.skipped:
        return "absent" if _ABSENT in dict(report.user_properties) else "does not apply"
    return "failed" if report.failed else "passed"


def reason_of(report: pytest.TestReport) -> str:
    """Return why a check of the kit's was left out or expected to fail; nothing if it passed or failed."""
    if hasattr(report, "wasxfail"):
        return str(report.wasxfail)
    # What pytest shows of a skip is a place and the reason.
    if isinstance(report.longrepr, tuple):
        return str(dict(report.user_properties).get(_ABSENT, report.longrepr[2].removeprefix("Skipped: ")))
    return ""
