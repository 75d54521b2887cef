"""What the optimisers ask first: which LoRA adapters of a model train, and whether a number is one they can use."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tunerkit.adapted_layer import AdaptedLayer
from tunerkit.errors import AdapterStateError, ArgumentError
from tunerkit.layer import layers_in
from tunerkit_lora.base import LowRankAdapter

if TYPE_CHECKING:
    from torch import nn


def training_adapters(model: nn.Module) -> list[tuple[str, LowRankAdapter]]:
    """Return the LoRA adapters of which something trains, each with the name of its layer.

    Raises:
        ArgumentError: The model holds no LoRA adapter.
        AdapterStateError: None of them trains.
    """
    found = [
        (layer.site.name, adapter)
        for layer in layers_in(model)
        if isinstance(layer, AdaptedLayer)
        for adapter in layer.adapters.values()
        if isinstance(adapter, LowRankAdapter)
    ]
    if not found:
        msg = f"The model ({type(model).__name__}) holds no LoRA adapter for the optimiser to train. Add one first."
        raise ArgumentError(msg)
    training = [(name, adapter) for name, adapter in found if any(own.requires_grad for own in adapter.parameters())]
    if not training:
        msg = (
            f"No LoRA adapter of the model ({type(model).__name__}) trains, so there is nothing to optimise. Call "
            "set_adapter, which lets adapters train, first."
        )
        raise AdapterStateError(msg)
    return training


def check_number(name: str, value: object, *, above_zero: bool = False) -> None:
    """Raise `ArgumentError` unless a value is a finite number of at least zero, or above it."""
    if isinstance(value, (int, float)) and math.isfinite(value) and value >= 0 and (value or not above_zero):
        return
    msg = f"{name} must be a number {'above' if above_zero else 'of at least'} zero; it is {value!r}."
    raise ArgumentError(msg)
