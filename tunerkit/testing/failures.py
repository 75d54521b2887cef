"""What the kit tells of the checks that failed: each message once, that of the most basic check first."""

from __future__ import annotations

import functools
import inspect
import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pytest

_WIDTH = 100


@dataclass(frozen=True)
class Failure:
    """One run of a check that failed.

    Attributes:
        check: The check's name.
        message: What it found, whole.
    """

    check: str
    message: str

    @classmethod
    def of(cls, report: pytest.TestReport) -> Failure:
        """Return what a report tells of a check that failed."""
        return cls(check_of(report), _message_of(report))


@dataclass
class Finding:
    """What the same checks have found, and no others.

    Attributes:
        checks: Their names, the most basic first.
        messages: What they have found, on one kind of site or another.
    """

    checks: tuple[str, ...]
    messages: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The first check's name, and how many others found the same."""
        others = len(self.checks) - 1
        return self.checks[0] if not others else f"{self.checks[0]} and {others} other{'s' if others > 1 else ''}"

    def lines(self) -> list[str]:
        """Return what they have found, and how to mend it, in lines; of several checks the message alone says how."""
        mend = f"To mend: {how_to_mend(self.checks[0])}" if len(self.checks) == 1 else ""
        texts = [*(line for message in self.messages for line in message.splitlines()), *filter(None, [mend])]
        return [line for text in texts for line in textwrap.wrap(text, _WIDTH, break_on_hyphens=False) or [""]]


def findings(failures: Iterable[Failure]) -> list[Finding]:
    """Return what checks have found, that of the most basic one first.

    Args:
        failures: Which checks failed, in any order.
    """
    order = checks_in_order()
    checks: dict[str, set[str]] = {}
    for failure in failures:
        checks.setdefault(failure.message, set()).add(failure.check)
    found: dict[tuple[str, ...], Finding] = {}
    for message, names in checks.items():
        key = tuple(sorted(names, key=order.index))
        found.setdefault(key, Finding(key)).messages.append(message)
    return sorted(found.values(), key=lambda finding: order.index(finding.checks[0]))


@functools.cache
def checks_in_order() -> tuple[str, ...]:
    """Return the names of all checks in the order in which pytest runs them, the basic ones first."""
    from tunerkit.testing.conformance import MethodConformance  # noqa: PLC0415 - it has a summary of its checks

    kinds = reversed(MethodConformance.__mro__)
    return tuple(name for kind in kinds for name in vars(kind) if name.startswith("test_"))


def how_to_mend(check: str) -> str:
    """Return how to mend what a check finds, as its docstring says."""
    from tunerkit.testing.conformance import MethodConformance  # noqa: PLC0415

    text = inspect.getdoc(getattr(MethodConformance, check)) or ""
    return " ".join(text.partition("To mend: ")[2].split())


def check_of(report: pytest.TestReport) -> str:
    """Return the name of the check that a report is of."""
    return report.location[2].partition("[")[0].rpartition(".")[2]


def _message_of(report: pytest.TestReport) -> str:
    # A check that was expected to fail and passes has a text in place of an error.
    crash = getattr(report.longrepr, "reprcrash", None)
    message = report.longreprtext if crash is None else crash.message
    # Below a message pytest shows the expression that is false, which says no more.
    return message.partition("\nassert ")[0].removeprefix("AssertionError: ").removeprefix("tunerkit.errors.").strip()
