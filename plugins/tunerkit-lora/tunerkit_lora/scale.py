"""Changing the scale of all LoRA adapters of a model for a while."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from tunerkit.adapted_layer import AdaptedLayer
from tunerkit.errors import ArgumentError
from tunerkit.layer import tuner_layers
from tunerkit_lora.base import LowRankAdapter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn


@contextlib.contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Within the block the scale of every LoRA adapter of a model is multiplied by a number.

    After it the scales are what they were before, also if an error ends the block. Between zero and one this
    interpolates between the base model and the adapted one, as in "Robust fine-tuning of zero-shot models" (arXiv
    2109.01903).

    Args:
        model: The model with the adapters, or a module that contains it.
        multiplier: The number.

    Raises:
        ArgumentError: `multiplier` is no number, or the model holds no LoRA adapter.
        AdapterStateError: A LoRA adapter is merged, so that its scale is part of a weight; nothing was changed.
    """
    given: object = multiplier
    if not isinstance(given, (int, float)):
        msg = f"multiplier must be a number; it is {given!r} of type {type(given).__name__}."
        raise ArgumentError(msg)
    layers = [layer for _, layer in tuner_layers(model) if isinstance(layer, AdaptedLayer)]
    found = [
        (layer, name, adapter)
        for layer in layers
        for name, adapter in layer.adapters.items()
        if isinstance(adapter, LowRankAdapter)
    ]
    if not found:
        msg = (
            f"The model ({type(model).__name__}) holds no LoRA adapter, so there is no scale to change. Add one first."
        )
        raise ArgumentError(msg)
    for layer, name, _ in found:
        layer.check_not_merged(name)
    before = [(adapter, adapter.scaling) for _, _, adapter in found]
    try:
        for adapter, scaling in before:
            adapter.scaling = scaling * multiplier
        yield
    finally:
        for adapter, scaling in before:
            adapter.scaling = scaling
