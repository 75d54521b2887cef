"""What the kit prints at the end of a pytest run: how many checks ran for each method, and what was left out."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

_NAME = "tunerkit-conformance"
_CASE, _ABSENT = "conformance", "absent"


class Summary:
    """A pytest plugin. The kit registers it when its first checks are collected, so no other run knows of it."""

    def __init__(self) -> None:
        self.counts: defaultdict[str, Counter[str]] = defaultdict(Counter)

    @classmethod
    def register(cls, config: pytest.Config) -> None:
        """Take part in this run, if it does not yet."""
        if not config.pluginmanager.has_plugin(_NAME):
            config.pluginmanager.register(cls(), _NAME)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a check of the kit's by how it went."""
        properties = dict(report.user_properties)
        if _CASE in properties and (report.when == "call" or (report.when == "setup" and not report.passed)):
            self.counts[str(properties[_CASE])][_outcome(report, absent=_ABSENT in properties)] += 1

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print a line for each class of checks."""
        if self.counts:
            terminalreporter.section("conformance")
        for case, count in sorted(self.counts.items()):
            terminalreporter.write_line(
                f"{case}: {count['ran']} checks ran, {count['absent']} were declared absent, "
                f"{count['expected']} failed as expected, {count['other']} did not apply"
            )


def note(item: pytest.Item, case: str, *, absent: bool) -> None:
    """Let the summary know what a test is."""
    item.user_properties.append((_CASE, case))
    if absent:
        item.user_properties.append((_ABSENT, "True"))


def _outcome(report: pytest.TestReport, *, absent: bool) -> str:
    if hasattr(report, "wasxfail"):
        return "expected"
    if report.skipped:
        return "absent" if absent else "other"
    return "ran"
