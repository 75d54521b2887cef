"""The page of the documentation that tells which check catches which mistake."""

from __future__ import annotations

import inspect
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "wrong-plugins.md"

HEAD = """# Wrong plugins

The checks of `tunerkit.testing` are tested by plugins that are wrong. Each is a few lines away from a right one, which
passes the same checks, and each is caught by the checks that stand beside it. The code of all of them is in
`tests/testing/wrong`. Whoever finds a mistake that no check catches adds it there, with the check that should.

This page is written by `python -m testing.wrong` in the folder `tests`, and a test says when it is no longer right.
"""


def written(table):
    """Return the page that tells of these wrong plugins."""
    parts = [HEAD]
    for module in dict.fromkeys(inspect.getmodule(wrong.kind) for wrong in table):
        parts.append(f"\n## {heading(module)}\n\n| What is wrong | Caught by |\n| --- | --- |\n")
        parts += [row(wrong) for wrong in table if wrong.kind.__module__ == module.__name__]
    return "".join(parts)


def heading(module):
    """Return what a module's wrong plugins have in common, from its docstring."""
    return inspect.getdoc(module).partition(":")[0].partition(",")[0].partition(" that ")[0].removesuffix(".")


def row(wrong):
    checks = ", ".join(f"`{check}`" for check in wrong.checks)
    return f"| {wrong.fault} | {checks} |\n"
