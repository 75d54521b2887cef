"""What a job has measured: figures by round, and the ratios that are made of them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from suite.job import Job
    from suite.libraries import Side


@dataclass(frozen=True)
class Spread:
    """A median between its quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Return the spread of some figures."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


@dataclass
class Result:
    """The figures of one job, round by round."""

    job: Job
    rounds: list[dict[Side, float]] = field(default_factory=list)

    def figure(self, side: Side) -> Spread | None:
        """Return what a side took, or None if it took no part."""
        values = [figures[side] for figures in self.rounds if side in figures]
        return Spread.of(values) if values else None

    def ratio(self, side: Side) -> Spread | None:
        """Return ours / another side: both of one round, so that what slows a machine down slows both."""
        values = [figures["ours"] / figures[side] for figures in self.rounds if side in figures]
        return Spread.of(values) if values else None

    def met(self, side: Side) -> bool | None:
        """Return whether the median meets the goal, or None if there is no goal or nothing to compare with."""
        goal, ratio = self.job.goals.get(side), self.ratio(side)
        return None if goal is None or ratio is None else ratio.median <= goal

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        others: tuple[Side, ...] = ("peft", "floor")
        ratios = {side: self.ratio(side) for side in others}
        return {
            "name": self.job.name,
            "title": self.job.title,
            "unit": self.job.unit,
            "reference": self.job.reference,
            "goals": dict(self.job.goals),
            "ratios": {side: None if spread is None else vars(spread) for side, spread in ratios.items()},
            "met": {side: self.met(side) for side in others},
            "rounds": self.rounds,
        }
