"""The plot: every job's ratios beside their goals, on a logarithmic axis."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from suite.libraries import Side
    from suite.result import Result

MET, MISSED, OPEN = "#2a7f62", "#c0392b", "#555555"
PANELS: tuple[tuple[Side, str], ...] = (("peft", "ours / PEFT"), ("floor", "ours / floor"))


def draw(path: Path, results: Sequence[Result]) -> None:
    """Draw the ratios into a file whose format is that of its suffix; the same figures give the same file."""
    import matplotlib as mpl  # noqa: PLC0415 - who only measures, or only asks for the list, need not have it
    from matplotlib.figure import Figure  # noqa: PLC0415 - the same

    with mpl.rc_context({"svg.hashsalt": "tunerkit", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(10, 1.2 + 0.24 * len(results)), layout="constrained")
        panels = figure.subplots(1, len(PANELS), sharey=True)
        for axes, (side, label) in zip(panels, PANELS, strict=True):
            _draw_panel(axes, results, side, label)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=120)


def _draw_panel(axes: Axes, results: Sequence[Result], side: Side, label: str) -> None:
    for place, result in enumerate(results):
        ratio, goal, met = result.ratio(side), result.job.goals[side], result.met(side)
        if ratio is None:
            continue
        colour = OPEN if met is None else MET if met else MISSED
        axes.plot([ratio.low, ratio.high], [place, place], color=colour, linewidth=3, alpha=0.5, solid_capstyle="butt")
        axes.plot(ratio.median, place, "o", color=colour, markersize=4)
        if goal is not None:
            axes.plot(goal, place, "|", color="black", markersize=9)
    axes.axvline(1, color="#999999", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(results)), [result.job.name for result in results])
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.3)
    axes.set_title(f"{label}  (line: quartiles, tick: goal)")
