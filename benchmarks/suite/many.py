"""A thousand adapters on one model."""

from __future__ import annotations

import time
from functools import cache
from typing import TYPE_CHECKING, Any

from suite import checkpoints
from suite.job import ProbedJob, TimedJob, Turn
from suite.probes import probe
from suite.rows import WIDTH, mixed_batch, one_adapter, served

if TYPE_CHECKING:
    from suite.job import Job
    from suite.libraries import Library, Side
    from suite.scale import Scale

LAYERS = 24
"""How many layers the model has on which memory is measured; an adapter's config, which counts too, is one for all."""


@cache
def crowd(side: Library, adapters: int) -> Any:
    """Return a model with many adapters; making it takes longer than measuring it, so every job uses the same."""
    return served(side, adapters)


def attach(side: Library, scale: Scale) -> Turn:
    """Attach one more; it is taken out again after every timing."""
    model = crowd(side, scale.adapters)
    return Turn(lambda: side.add(model, "more"), lambda: model.delete_adapter("more"))


def switch(side: Library, scale: Scale) -> Turn:
    """Make another one active."""
    model = crowd(side, scale.adapters)
    return Turn(lambda: model.set_adapter("a1"), lambda: model.set_adapter("a0"))


def save(side: Library, scale: Scale) -> Turn:
    """Write one."""
    model = crowd(side, scale.adapters)
    folder = checkpoints.scratch() / f"many-by-{id(model)}"
    return Turn(lambda: model.save_pretrained(folder, selected_adapters=["a1"]))


def serve(side: Library, scale: Scale) -> Turn:
    """Run a batch whose rows all have an adapter of their own."""
    model = crowd(side, scale.adapters)
    apart = scale.adapters // scale.copies
    return mixed_batch(model, [f"a{number * apart}" for number in range(scale.copies)])


def memory(scale: Scale) -> dict[Side, float]:
    """Return how many KiB an adapter takes beyond its tensors, a layer."""
    figures: dict[Side, float] = {
        side: probe("adapters", side, adapters=scale.adapters // 5, width=WIDTH, depth=LAYERS)
        for side in ("ours", "peft")
    }
    return {**figures, "floor": 3.0}


JOBS: tuple[Job, ...] = (
    TimedJob(name="many.attach", title="attach one more to 1,000 adapters, 2 layers", make=attach, rounds=11),
    TimedJob(name="many.set", title="`set_adapter` among 1,000, 2 layers", make=switch, rounds=11),
    TimedJob(name="many.save", title="save one of 1,000, 2 layers", make=save, clock=time.perf_counter, rounds=11),
    TimedJob(
        name="many.serve",
        title="64 rows over 64 of 1,000 adapters, 2 layers",
        reference="ours, one adapter",
        make=serve,
        make_floor=one_adapter,
        same=("ours", "peft"),
        calls=5,
        rounds=21,
    ),
    ProbedJob(
        name="many.memory",
        title=f"memory of an adapter beyond its tensors, a layer, {LAYERS} layers",
        reference="3 KiB",
        probe=memory,
        unit="KiB",
        floor=1.0,
        rounds=3,
    ),
)
