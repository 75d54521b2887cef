"""What a job is: the same work on every side, the goals, and how one round of it is measured."""

from __future__ import annotations

import gc
import itertools
import time
from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from suite.libraries import SIDES, library

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from suite.libraries import Library, Side
    from suite.scale import Scale


class DifferentWorkError(Exception):
    """The sides of a job do not compute the same, so that timing them would compare nothing."""


TOLERANCE = 1e-4
"""How far outputs may be apart, as a part of the largest number."""


def nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Turn:
    """One side of a job, ready to run.

    Attributes:
        run: What is measured.
        reset: Brings everything back to where `run` can run again; not timed.
        output: Returns, after `run`, what must be the same on every side. Asked once, before the first timing.
    """

    run: Callable[[], object]
    reset: Callable[[], object] = nothing
    output: Callable[[], Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class Job(ABC):
    """One row of the table.

    Attributes:
        name: How it is asked for, `family.what`.
        title: What is done, in words.
        peft: The goal for ours / PEFT.
        floor: The goal for ours / floor.
        reference: What the floor is here.
        unit: What its figures are in.
        rounds: How many rounds it is measured if nothing else is said.
    """

    name: str
    title: str
    peft: float | None = None
    floor: float | None = None
    reference: str = "by hand"
    unit: str = "s"
    rounds: int = 7

    @property
    def goals(self) -> Mapping[Side, float | None]:
        """The goals for ours / another side."""
        return {"peft": self.peft, "floor": self.floor}

    @abstractmethod
    def measure(self, scale: Scale) -> Iterator[dict[Side, float]]:
        """Go on measuring: every round yields a figure for each side."""


@dataclass(frozen=True, kw_only=True)
class TimedJob(Job):
    """A job whose sides run alternately in this process.

    Attributes:
        make: Prepares a side.
        make_floor: Prepares the floor where it is something else than the same work by hand.
        calls: How many calls one timing holds.
        sides: Who takes part.
        same: Whose outputs must be equal.
        slow: The sides that take minutes and are run only if that is asked for.
        clock: CPU time, which others on the machine do not make longer; or the time of day, where waiting counts.
    """

    make: Callable[[Library, Scale], Turn]
    make_floor: Callable[[Scale], Turn] | None = None
    calls: int = 1
    sides: tuple[Side, ...] = SIDES
    same: tuple[Side, ...] = SIDES
    slow: tuple[Side, ...] = ()
    clock: Callable[[], float] = time.process_time

    def turn(self, side: Side, scale: Scale) -> Turn:
        """Prepare a side."""
        if side == "floor" and self.make_floor is not None:
            return self.make_floor(scale)
        return self.make(library(side), scale)

    def measure(self, scale: Scale) -> Iterator[dict[Side, float]]:
        """Run every side once, see that all compute the same, then time them, in another order every round.

        Raises:
            DifferentWorkError: They do not.
        """
        sides = [side for side in self.sides if scale.slow or side not in self.slow]
        turns = {side: self.turn(side, scale) for side in sides}
        self.check(turns)
        calls = max(1, round(self.calls * scale.effort))
        for number in itertools.count():
            shift = number % len(sides)
            with quiet():
                times = {side: seconds(turns[side], calls, self.clock) for side in (*sides[shift:], *sides[:shift])}
            yield {side: times[side] for side in sides}

    def check(self, turns: Mapping[Side, Turn]) -> None:
        """Run every side once and compare what they compute.

        Raises:
            DifferentWorkError: It is not the same.
        """
        outputs = {}
        for side, turn in turns.items():
            turn.run()
            if turn.output is not None and side in self.same:
                outputs[side] = turn.output()
            turn.reset()
        if "ours" not in outputs:
            return
        ours = outputs["ours"]
        for side, output in outputs.items():
            away = distance(ours, output)
            if not away <= TOLERANCE:
                msg = f"{self.name}: what {side} computes differs from ours by {away:.1e} of its largest number."
                raise DifferentWorkError(msg)


@dataclass(frozen=True, kw_only=True)
class ProbedJob(Job):
    """A job whose figures come from elsewhere, such as from processes of their own.

    Attributes:
        probe: Returns the figures of one round.
    """

    probe: Callable[[Scale], dict[Side, float]]

    def measure(self, scale: Scale) -> Iterator[dict[Side, float]]:
        """Ask for one round after the other."""
        while True:
            yield self.probe(scale)


def distance(one: Tensor, other: Tensor) -> float:
    """Return how far two outputs are apart, as a part of the largest number of the second."""
    return float((one - other).abs().max() / other.abs().max()) if one.shape == other.shape else float("inf")


def seconds(turn: Turn, calls: int = 1, clock: Callable[[], float] = time.process_time) -> float:
    """Return how many seconds a call takes, and make the next one possible."""
    run = turn.run
    start = clock()
    for _ in range(calls):
        run()
    taken = (clock() - start) / calls
    turn.reset()
    return taken


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block the garbage collector does not run."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
