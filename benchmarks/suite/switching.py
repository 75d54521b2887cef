"""Switching among adapters, switching them off, and saving one of several."""

from __future__ import annotations

import time
from functools import cache
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from suite import checkpoints
from suite.attach import output_with
from suite.job import TimedJob, Turn
from suite.models import mixture

if TYPE_CHECKING:
    from torch import Tensor

    from suite.job import Job
    from suite.libraries import Library
    from suite.scale import Scale


@cache
def two_adapters(side: Library, scale: Scale) -> Any:
    """Return a mixture of experts with the adapters `default`, which is active, and `second`.

    Every job uses the same one and leaves it as it was: PEFT takes half a minute to make it.
    """
    model = side.attach(mixture(scale.layers, scale.experts))
    side.add(model, "second")
    side.fill(model, "default", "second")
    return model


def switch(side: Library, scale: Scale) -> Turn:
    """Make the other one of two adapters active."""
    model = two_adapters(side, scale)
    return Turn(
        lambda: model.set_adapter("second"),
        lambda: model.set_adapter("default"),
        lambda: output_with(side, model, "second", filled=True),
    )


def disable(side: Library, scale: Scale) -> Turn:
    """Enter and leave `disable_adapter()`."""
    model = two_adapters(side, scale)

    def run() -> None:
        with model.disable_adapter():
            pass

    def output() -> Tensor:
        with model.disable_adapter():
            return output_with(side, model, "default", filled=True)

    return Turn(run, output=output)


def save(side: Library, scale: Scale) -> Turn:
    """Write one of two adapters."""
    model = two_adapters(side, scale)
    folder = checkpoints.scratch() / f"saved-by-{id(model)}"

    def output() -> Tensor:
        tensors = load_file(folder / "second" / "adapter_model.safetensors")
        return sum(tensors[key].sum() * number for number, key in enumerate(sorted(tensors)))  # type: ignore[return-value]

    return Turn(lambda: model.save_pretrained(folder, selected_adapters=["second"]), output=output)


JOBS: tuple[Job, ...] = (
    TimedJob(name="switching.set", title="`set_adapter`", make=switch, peft=0.1),
    TimedJob(name="switching.disable", title="enter and leave `disable_adapter()`", make=disable, peft=0.05),
    TimedJob(name="switching.save", title="save one of two adapters", make=save, clock=time.perf_counter, peft=0.25),
)
