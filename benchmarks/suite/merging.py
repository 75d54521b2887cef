"""Folding an adapter into the weights of a mixture of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from suite.attach import output_with
from suite.job import TimedJob, Turn
from suite.models import mixture

if TYPE_CHECKING:
    from torch import Tensor

    from suite.job import Job
    from suite.libraries import Library
    from suite.scale import Scale


def filled(side: Library, scale: Scale) -> Any:
    """Return a mixture of experts with an adapter that is not zero."""
    model = side.attach(mixture(scale.layers, scale.experts))
    side.fill(model, "default")
    return model


def merge(side: Library, scale: Scale) -> Turn:
    """Merge; taken out again after every timing."""
    model = filled(side, scale)
    return Turn(model.merge_adapter, model.unmerge_adapter, lambda: output_with(side, model, "default", filled=True))


def unmerge(side: Library, scale: Scale) -> Turn:
    """Take out what is merged; merged again after every timing."""
    model = filled(side, scale)
    model.merge_adapter()
    return Turn(model.unmerge_adapter, model.merge_adapter, lambda: output_with(side, model, "default", filled=True))


def merge_and_unload(side: Library, scale: Scale) -> Turn:
    """Merge for good; a new model for every timing."""
    model, merged = filled(side, scale), None

    def run() -> None:
        nonlocal merged
        merged = model.merge_and_unload()

    def reset() -> None:
        nonlocal model, merged
        model, merged = filled(side, scale), None

    def output() -> Tensor:
        return output_with(side, merged, "default", filled=True)

    return Turn(run, reset, output)


JOBS: tuple[Job, ...] = (
    TimedJob(name="merging.merge", title="`merge_adapter`", make=merge, peft=0.6),
    TimedJob(name="merging.unmerge", title="`unmerge_adapter`", make=unmerge, peft=0.6),
    TimedJob(name="merging.unload", title="`merge_and_unload`", make=merge_and_unload, peft=0.5, rounds=5),
)
