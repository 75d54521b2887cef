"""What `torch.compile` takes to trace a model. How many graphs there are is counted in the tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from suite.job import TimedJob, Turn
from suite.models import inputs, stack

if TYPE_CHECKING:
    from torch import Tensor

    from suite.job import Job
    from suite.libraries import Library
    from suite.scale import Scale

WIDTH = 64
DEPTH = 8


def trace(side: Library, scale: Scale) -> Turn:
    """Run for the first time, without a code generator, which would take as long on every side."""
    del scale
    model, x = side.attach(stack(WIDTH, DEPTH)), inputs(1, WIDTH)
    side.fill(model, "default")
    model.eval()
    compiled = torch.compile(model.get_base_model(), backend="eager", fullgraph=True)

    def run() -> Tensor:
        with torch.no_grad():
            return compiled(x)  # type: ignore[no-any-return, no-untyped-call]

    return Turn(run, torch.compiler.reset, run)


JOBS: tuple[Job, ...] = (TimedJob(name="compiling.trace", title="trace 8 layers for `torch.compile`", make=trace),)
