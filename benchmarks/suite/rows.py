"""One batch whose rows have adapters of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from suite.forward import calling
from suite.job import TimedJob, Turn
from suite.libraries import library
from suite.models import inputs, stack

if TYPE_CHECKING:
    from torch import Tensor

    from suite.job import Job
    from suite.libraries import Library
    from suite.scale import Scale

WIDTH = 256
DEPTH = 2
ROWS = 64
ADAPTERS = 32


def served(side: Library, adapters: int) -> Any:
    """Return a model in evaluation mode with some adapters, `a0` and on."""
    model = side.attach(stack(WIDTH, DEPTH), "a0")
    for number in range(1, adapters):
        side.add(model, f"a{number}")
    side.fill(model, *(f"a{number}" for number in range(adapters)))
    model.eval()
    return model


def mixed(side: Library, scale: Scale) -> Turn:
    """Run rows over all adapters in turn."""
    del scale
    return mixed_batch(served(side, ADAPTERS), [f"a{number % ADAPTERS}" for number in range(ROWS)])


def mixed_batch(model: Any, names: list[str]) -> Turn:
    """Run one row for each name."""
    x = inputs(len(names), WIDTH)

    def run() -> Tensor:
        with torch.no_grad():
            return model(x, adapter_names=names)  # type: ignore[no-any-return]

    return Turn(run, output=run)


def one_adapter(scale: Scale) -> Turn:
    """Run as many rows with one adapter."""
    del scale
    return calling(served(library("ours"), 1), inputs(ROWS, WIDTH))


JOBS: tuple[Job, ...] = (
    TimedJob(
        name="rows.mixed",
        title="64 rows over 32 adapters, width 256, 2 layers",
        reference="ours, one adapter",
        make=mixed,
        make_floor=one_adapter,
        same=("ours", "peft"),
        peft=0.15,
        floor=2,
        calls=20,
        rounds=31,
    ),
)
