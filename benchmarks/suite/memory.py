"""How much memory a job takes at its peak, in a process of its own for every side."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from suite import checkpoints
from suite.job import ProbedJob
from suite.libraries import SIDES
from suite.probes import probe

if TYPE_CHECKING:
    from suite.job import Job
    from suite.libraries import Side
    from suite.scale import Scale


def peaks(scale: Scale, *, what: str) -> dict[Side, float]:
    """Return the peaks of one round, in MiB above what the process held with its libraries imported."""
    width, depth = scale.block_width, scale.blocks
    folder = str(checkpoints.of_stack(width, depth)) if what == "load" else ""
    return {side: probe(what, side, width=width, depth=depth, folder=folder) for side in SIDES}


def peak_of(what: str, title: str, floor: float | None = 1.05) -> Job:
    """Return the job that measures the peak of a kind of work."""
    return ProbedJob(
        name=f"memory.{what}",
        title=f"peak memory of {title}",
        unit="MiB",
        probe=partial(peaks, what=what),
        peft=1.0,
        floor=floor,
        rounds=3,
    )


JOBS: tuple[Job, ...] = (
    peak_of("train", "a training step, 64 rows, 8 layers, width 2048"),
    peak_of("load", "loading, 8 layers, width 2048"),
    peak_of("merge", "`merge_adapter`, 8 layers, width 2048", floor=None),
    peak_of("given-up", '`merge_adapter`, ours with `keep_base="none"`, 8 layers, width 2048', floor=None),
    peak_of("unload", "`merge_and_unload`, 8 layers, width 2048"),
)
