"""One forward of a frozen model in evaluation mode."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from suite.job import TimedJob, Turn
from suite.models import inputs, stack

if TYPE_CHECKING:
    from torch import Tensor

    from suite.job import Job
    from suite.libraries import Library
    from suite.scale import Scale

DEPTH = 8


def layers(side: Library, scale: Scale, *, width: int, rows: int = 1) -> Turn:
    """Run the adapted layers, one after the other."""
    del scale
    model = side.attach(stack(width, DEPTH))
    side.fill(model, "default")
    model.eval()
    return calling(model.get_base_model(), inputs(rows, width))


def whole(side: Library, scale: Scale, *, width: int) -> Turn:
    """Call a model of one layer from outside, through all that is around it."""
    del scale
    model = side.attach(stack(width, 1))
    side.fill(model, "default")
    model.eval()
    return calling(model, inputs(1, width))


def calling(model: torch.nn.Module, x: Tensor) -> Turn:
    """Call a model without gradients."""

    def run() -> Tensor:
        with torch.no_grad():
            return model(x)  # type: ignore[no-any-return]

    return Turn(run, output=run)


JOBS: tuple[Job, ...] = (
    TimedJob(
        name="forward.64",
        title="forward, 1 row, width 64, 8 layers",
        make=partial(layers, width=64),
        peft=0.7,
        floor=1.1,
        calls=200,
        rounds=31,
    ),
    TimedJob(
        name="forward.512",
        title="forward, 1 row, width 512, 8 layers",
        make=partial(layers, width=512),
        peft=1.0,
        floor=1.1,
        calls=100,
        rounds=31,
    ),
    TimedJob(
        name="forward.512-64",
        title="forward, 64 rows, width 512, 8 layers",
        make=partial(layers, width=512, rows=64),
        calls=20,
        rounds=21,
    ),
    TimedJob(
        name="forward.whole",
        title="call the model, 1 row, width 64, 1 layer",
        make=partial(whole, width=64),
        calls=500,
        rounds=31,
    ),
)
