"""Putting adapters into a mixture of experts: the first, a second, and a third from disk."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from suite import checkpoints
from suite.job import ProbedJob, TimedJob, Turn, quiet, seconds
from suite.libraries import library
from suite.models import MIXTURE_WIDTH, inputs, mixture

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from suite.job import Job
    from suite.libraries import Library, Side
    from suite.scale import Scale


def output_with(side: Library, model: Any, name: str, *, filled: bool = False) -> Tensor:
    """Return a model's output with an adapter that now holds what it holds on every side."""
    if not filled:
        side.fill(model, name)
    model.eval()
    with torch.no_grad():
        return model(inputs(4, MIXTURE_WIDTH))  # type: ignore[no-any-return]


def first(side: Library, scale: Scale, *, many: bool = False) -> Turn:
    """Attach to a base model; a new one for every timing."""
    make = partial(mixture, scale.layers, scale.many_experts if many else scale.experts)
    base, model = make(), None

    def run() -> None:
        nonlocal model
        model = side.attach(base)

    def reset() -> None:
        nonlocal base, model
        base, model = make(), None

    return Turn(run, reset, lambda: output_with(side, model, "default"))


def second(side: Library, scale: Scale, *, many: bool = False, there: Sequence[str] = ()) -> Turn:
    """Add to a model with one adapter, or some more; it is taken out again after every timing."""
    model = side.attach(mixture(scale.layers, scale.many_experts if many else scale.experts))
    for name in there:
        side.add(model, name)

    def output() -> Tensor:
        model.set_adapter("second")
        result = output_with(side, model, "second")
        model.set_adapter("default")
        return result

    return Turn(lambda: side.add(model, "second"), lambda: model.delete_adapter("second"), output)


def third(side: Library, scale: Scale, *, many: bool = False) -> Turn:
    """Load into a model with two adapters; it is taken out again after every timing."""
    experts = scale.many_experts if many else scale.experts
    folder = checkpoints.of_mixture(scale.layers, experts)
    model = side.attach(mixture(scale.layers, experts))
    side.add(model, "second")

    def output() -> Tensor:
        model.set_adapter("third")
        result = output_with(side, model, "third", filled=True)
        model.set_adapter("default")
        return result

    return Turn(lambda: model.load_adapter(folder, "third"), lambda: model.delete_adapter("third"), output)


def both(one: Turn, other: Turn, *, share: float = 1.0) -> dict[Side, float]:
    """Time two turns of ours one after the other; the second, times `share`, stands in for the floor."""
    with quiet():
        return {"ours": seconds(one), "floor": share * seconds(other)}


class Growth:
    """Times one of our turns against another that is to cost as much.

    Args:
        make: Prepares the two, and says what the second is multiplied with.
    """

    def __init__(self, make: Callable[[Library, Scale], tuple[Turn, Turn, float]]) -> None:
        self.make = make
        self.turns: tuple[Turn, Turn, float] | None = None

    def __call__(self, scale: Scale) -> dict[Side, float]:
        """Return the figures of one round."""
        if self.turns is None:
            self.turns = self.make(library("ours"), scale)
        one, other, share = self.turns
        return both(one, other, share=share)


def by_modules(side: Library, scale: Scale) -> tuple[Turn, Turn, float]:
    """Attach to the largest mixture, and to the smaller one times what it has fewer modules."""
    share = (4 + 3 * scale.many_experts) / (4 + 3 * scale.experts)
    return first(side, scale, many=True), first(side, scale), share


def by_adapters(side: Library, scale: Scale) -> tuple[Turn, Turn, float]:
    """Add a twelfth adapter, and a second."""
    return second(side, scale, there=[f"other{number}" for number in range(10)]), second(side, scale), 1.0


WIDE = "18,624 linears"
JOBS: tuple[Job, ...] = (
    TimedJob(name="attach.first", title="attach to 4,800 linears", make=first, peft=0.10, floor=2.5),
    TimedJob(name="attach.second", title="attach a second adapter", make=second, peft=0.02, floor=2.5, rounds=3),
    TimedJob(name="attach.load", title="load a third from disk", make=third, peft=0.03, floor=4, rounds=3),
    TimedJob(
        name="attach.first-wide",
        title=f"attach to {WIDE}",
        make=partial(first, many=True),
        floor=2.5,
        slow=("peft",),
        rounds=3,
    ),
    TimedJob(
        name="attach.second-wide",
        title=f"attach a second adapter, {WIDE}",
        make=partial(second, many=True),
        floor=2.5,
        slow=("peft",),
        rounds=3,
    ),
    TimedJob(
        name="attach.load-wide",
        title=f"load a third from disk, {WIDE}",
        make=partial(third, many=True),
        floor=4,
        slow=("peft",),
        rounds=3,
    ),
    ProbedJob(
        name="attach.by-modules",
        title=f"attach to {WIDE}",
        reference="ours at 4,800, by module",
        probe=Growth(by_modules),
        floor=1.15,
        rounds=3,
    ),
    ProbedJob(
        name="attach.by-adapters",
        title="attach a twelfth adapter",
        reference="ours, a second adapter",
        probe=Growth(by_adapters),
        floor=1.1,
        rounds=5,
    ),
)
