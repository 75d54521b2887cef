"""Whether an adapter changes the model at all, for those who ask when they load one (`verify=True`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tunerkit.adapted_layer import AdaptedLayer
from tunerkit.copied_module import CopiedModule
from tunerkit.errors import CheckpointError, NoEffectError
from tunerkit.naming import listing

if TYPE_CHECKING:
    from torch import Tensor

    from tunerkit.layer import BaseTunerLayer
    from tunerkit.tuner import BaseTuner

_STARTS = (0, 1)
"""The numbers that tensors which change nothing are filled with: what is added, and what is multiplied."""


def check_effect(tuner: BaseTuner, name: str, source: str) -> None:
    """Refuse an adapter that leaves every layer as it is; the first layer that it changes ends the search.

    What has no merged form, and what a method has put in by itself, counts as a change: it cannot be seen from outside.
    The base model's embeddings, which a checkpoint may hold beside an adapter, are not the adapter's.

    Args:
        tuner: The model with the adapter.
        name: The adapter's name.
        source: Where it comes from, for messages.

    Raises:
        NoEffectError: It changes nothing.
        CheckpointError: The base model's weights are not there, so it cannot be said.
    """
    layers = [layer for layer in tuner.layers() if layer.holds(name)]
    if any(tensor.is_meta for layer in layers for tensor in layer.get_base_layer().parameters()):
        msg = (
            f"{source} cannot be verified: the base model is on the meta device, so there is nothing that the adapter "
            "could change. Load the base model's weights first, or leave verify out."
        )
        raise CheckpointError(msg)
    biases = tuner.biases.name == name and tuner.biases.differ()
    if biases or _surrounds(tuner, name) or any(_changes(layer, name) for layer in layers):
        return
    msg = (
        f"{source} has no effect: none of the {len(layers)} layers with the adapter {name!r} computes anything else "
        f"with it (verify=True). {_reason(layers, name)} Leave verify out to load it all the same."
    )
    raise NoEffectError(msg)


def _surrounds(tuner: BaseTuner, name: str) -> bool:
    """Return whether the adapter does something around a call of the model, which no layer shows."""
    return name in tuner.parts and tuner.parts[name].surrounds()


def _changes(layer: BaseTunerLayer, name: str) -> bool:
    if isinstance(layer, AdaptedLayer):
        return layer.adapters[name].has_effect(layer.bare_site)
    if isinstance(layer, CopiedModule):
        original = layer.get_base_layer().state_dict()
        copied = layer.adapter_tensors(name)
        return any(not torch.equal(tensor, original[key]) for key, tensor in copied.items())
    return True


def _reason(layers: list[BaseTunerLayer], name: str) -> str:
    """Return what makes the adapter one without effect, as far as its tensors say it, and what to do."""
    constant: dict[str, str] = {}
    for layer in layers:
        if isinstance(layer, AdaptedLayer):
            for key, tensor in layer.adapter_tensors(name).items():
                number = _filled_with(tensor)
                if number is not None:
                    constant.setdefault(key, f"{key} is {number} everywhere")
    if constant:
        return (
            f"{'; '.join(list(constant.values())[:4])}, as before any training: save the adapter after training, and "
            "from the process that holds what was trained."
        )
    return f"Its tensors are not at a start, so look at what the config scales them by ({_settings(layers, name)})."


def _settings(layers: list[BaseTunerLayer], name: str) -> str:
    adapters = (layer.adapters[name] for layer in layers if isinstance(layer, AdaptedLayer))
    found = {f"{key}={getattr(adapter, key)}" for adapter in adapters for key in adapter.settings}
    return listing(sorted(found))


def _filled_with(tensor: Tensor) -> int | None:
    return next((number for number in _STARTS if bool((tensor == number).all())), None)
