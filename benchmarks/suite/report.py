"""The table on the screen, and the files: a table in Markdown, everything in JSON, and a plot."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from suite.libraries import Side
    from suite.result import Result, Spread

COLUMNS = ("job", "work", "ours", "PEFT", "floor", "ours / PEFT", "goal", "ours / floor", "goal", "floor is")
SHOWN = (0, 2, 3, 4, 5, 6, 7, 8)
"""The columns that fit on a screen; what the jobs are is said by `--list`."""
VERDICTS = {True: "met", False: "not met"}
COLOURS = {True: "green", False: "red", None: "default"}


def cells(result: Result) -> list[str]:
    """Return a row of the table."""
    job, sides = result.job, ("ours", "peft", "floor")
    return [
        job.name,
        job.title,
        *(_amount(result.figure(side), job.unit) for side in sides),  # type: ignore[arg-type]
        _ratio(result.ratio("peft")),
        _goal(result, "peft"),
        _ratio(result.ratio("floor")),
        _goal(result, "floor"),
        job.reference if result.ratio("floor") else "",
    ]


def screen_table(results: Sequence[Result]) -> Table:
    """Return the table as it is printed."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in SHOWN:
        table.add_column(COLUMNS[column], no_wrap=True)
    for result in results:
        row = [escape(cell) for cell in cells(result)]
        for column, side in ((6, "peft"), (8, "floor")):
            row[column] = f"[{COLOURS[result.met(side)]}]{row[column]}[/]"  # type: ignore[arg-type]
        table.add_row(*(row[column] for column in SHOWN))
    return table


def markdown_table(results: Sequence[Result]) -> str:
    """Return the table in Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(cells(result) for result in results)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def verdict(results: Sequence[Result]) -> str:
    """Return in one line how many goals are met, and which are not."""
    sides: tuple[Side, ...] = ("peft", "floor")
    found = [(result.job.name, side, result.met(side)) for result in results for side in sides]
    judged = [met for _, _, met in found if met is not None]
    missed = [f"{name} (ours / {'PEFT' if side == 'peft' else side})" for name, side, met in found if met is False]
    line = f"{sum(judged)} of {len(judged)} goals are met."
    return f"{line} Not met: {', '.join(missed)}." if missed else line


def write(folder: Path, results: Sequence[Result], around: dict[str, Any]) -> None:
    """Write the table and the JSON into a folder; the plot is `suite.plot.draw`."""
    folder.mkdir(parents=True, exist_ok=True)
    table = f"# Figures\n\n{markdown_table(results)}\n{verdict(results)}\n\n{_caption(around)}\n"
    (folder / "table.md").write_text(table, encoding="utf-8")
    values = {**around, "jobs": [result.as_json() for result in results]}
    (folder / "results.json").write_text(f"{json.dumps(values, indent=1)}\n", encoding="utf-8")


def _caption(around: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in around["packages"].items())
    return (
        f"Medians, and in brackets the quartiles of the rounds' ratios. Scale: {around['scale']}. One thread of "
        f"{around['cores']} cores, {around['machine']}, Python {around['python']}, {packages}."
    )


def _amount(spread: Spread | None, unit: str) -> str:
    if spread is None:
        return ""
    value = spread.median
    if unit != "s":
        return f"{value:.3g} {unit}"
    for limit, factor, name in ((1, 1, "s"), (1e-3, 1e3, "ms")):
        if value >= limit:
            return f"{value * factor:.3g} {name}"
    return f"{value * 1e6:.3g} us"


def _ratio(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.median:.3g} ({spread.low:.3g} to {spread.high:.3g})"


def _goal(result: Result, side: Side) -> str:
    goal, met = result.job.goals[side], result.met(side)
    if goal is None:
        return ""
    return f"{goal:g}" if met is None else f"{goal:g}: {VERDICTS[met]}"
