"""One step of training: forward, backward, and the optimiser's step."""

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

WIDTH = 512
DEPTH = 4


def step(side: Library, scale: Scale, *, rows: int) -> Turn:
    """Train the adapter one step further."""
    del scale
    model = side.attach(stack(WIDTH, DEPTH))
    side.fill(model, "default")
    layers, x = model.get_base_model().train(), inputs(rows, WIDTH)
    optimizer = torch.optim.SGD([p for p in layers.parameters() if p.requires_grad], lr=1e-2)

    def run() -> None:
        optimizer.zero_grad()
        layers(x).square().mean().backward()
        optimizer.step()

    def output() -> Tensor:
        with torch.no_grad():
            return layers(x)  # type: ignore[no-any-return]

    return Turn(run, output=output)


JOBS: tuple[Job, ...] = (
    TimedJob(
        name="training.64",
        title="training step, width 512, 64 rows, 4 layers",
        make=partial(step, rows=64),
        peft=1.0,
        floor=1.05,
        calls=15,
        rounds=31,
    ),
    TimedJob(
        name="training.256",
        title="training step, width 512, 256 rows, 4 layers",
        make=partial(step, rows=256),
        peft=1.0,
        floor=1.05,
        calls=5,
        rounds=31,
    ),
)
