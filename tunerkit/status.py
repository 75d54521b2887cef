"""What adapters a model has, layer by layer and as a whole: PEFT's `get_layer_status` and `get_model_status`."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from tunerkit.adapted_layer import AdaptedLayer
from tunerkit.errors import StatusError, UnknownAdapterError
from tunerkit.tuner import find_tuner, tuner_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor

    from tunerkit.layer import BaseTunerLayer

Irregular = Literal["irregular"]
"""What stands where layers, or the tensors of one layer, do not agree."""


@dataclass
class TunerLayerStatus:
    """What one layer says of its adapters, with PEFT's fields.

    Attributes:
        name: Its path below the tuner, or below the model if there is no tuner around it.
        module_type: The methods whose adapters it holds and the class of its base layer, such as `lora.Linear`.
        enabled: Whether its adapters are switched on.
        active_adapters: The names of the active adapters, in the order in which they stand on one another.
        merged_adapters: The names of the merged adapters.
        requires_grad: By adapter, whether its tensors train, or `"irregular"` if some do; tensors that its method
            never trains do not count.
        available_adapters: The names of all its adapters, sorted.
        devices: By adapter, the types of the devices that hold its tensors.
        quantization_backend: The library that stores the base layer's weight, and in how many bits, such as
            `"bnb 4bit"`, or None if it is a plain tensor.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass
class TunerModelStatus:
    """What all layers of a model say of their adapters, with PEFT's fields.

    Attributes:
        base_model_type: The class of the base model.
        adapter_model_type: The class of the tuner, or `"None"` if adapters were injected.
        peft_types: The type of the method, by adapter.
        trainable_params: How many parameters train.
        total_params: How many parameters there are.
        num_adapter_layers: How many layers have adapters.
        enabled: Whether the adapters are switched on.
        active_adapters: The names of the active adapters.
        merged_adapters: The names of the merged adapters, sorted; irregular if one is merged on some of its layers.
        requires_grad: By adapter, whether its tensors train, those included that it has once per model.
        available_adapters: The names of all adapters that a layer has, sorted.
        devices: By adapter, the types of the devices that hold its tensors.
        quantization_backend: The library that stores the weights of the adapted layers, or None; irregular if it is
            not the same for all of them.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None = None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """Return what every layer of a model says of its adapters.

    Args:
        model: A `PeftModel`, or a model into which adapters were injected.

    Raises:
        StatusError: It is no model.
        UnknownAdapterError: No layer has an adapter.
    """
    _check_model(model)
    tuner = tuner_of(model)
    # As in PEFT, paths are those below the tuner where there is one, and it calls the base model `model`.
    paths = {id(module): path for path, module in (find_tuner(model) or tuner.model).named_modules()}
    found = [_status_of(paths[id(layer)], layer) for layer in tuner.layers()]
    if not found:
        msg = (
            f"The model ({type(model).__name__}) has no layers with adapters. Attach one with get_peft_model(model, "
            "config), or put one in with inject_adapter_in_model(config, model)."
        )
        raise UnknownAdapterError(msg)
    return found


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """Return what the layers of a model together say of their adapters.

    Args:
        model: A `PeftModel`, or a model into which adapters were injected.

    Raises:
        StatusError: It is no model.
        UnknownAdapterError: No layer has an adapter.
    """
    layers = get_layer_status(model)
    tuner = tuner_of(model)
    trainable, total = count_parameters(model)
    active = {tuple(layer.active_adapters) for layer in layers}
    enabled = {layer.enabled for layer in layers}
    merged = {name for layer in layers for name in layer.merged_adapters}
    backends = {layer.quantization_backend for layer in layers}
    partly = any(merged & (set(layer.available_adapters) - set(layer.merged_adapters)) for layer in layers)
    parts = {name: _trains(part.parameters()) for name, part in tuner.parts.items() if [*part.parameters()]}
    return TunerModelStatus(
        base_model_type=type(tuner.model).__name__,
        adapter_model_type=type(tuner).__name__ if tuner is find_tuner(model) else "None",
        peft_types={name: str(config.peft_type) for name, config in tuner.peft_config.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=enabled.pop() if len(enabled) == 1 else "irregular",
        active_adapters=list(active.pop()) if len(active) == 1 else "irregular",
        merged_adapters="irregular" if partly else sorted(merged),
        requires_grad={
            name: values[0] if all(value == values[0] for value in values) else "irregular"
            for name, values in _gathered([*(layer.requires_grad for layer in layers), parts]).items()
        },
        available_adapters=sorted({name for layer in layers for name in layer.available_adapters}),
        devices={
            name: sorted({device for devices in found for device in devices})
            for name, found in _gathered(layer.devices for layer in layers).items()
        },
        quantization_backend=backends.pop() if len(backends) == 1 else "irregular",
    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters of a model train, and how many there are.

    A tensor that packs two numbers of 4 bits into a byte counts as the numbers it stands for, and one that DeepSpeed
    has spread over processes as the whole.
    """
    counts = [(_count(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, trains in counts if trains), sum(count for count, _ in counts)


def _count(parameter: Tensor) -> int:
    if type(parameter).__name__ == "Params4bit":  # bitsandbytes', which need not be installed
        return parameter.numel() * 2 * parameter.element_size()
    whole: int = getattr(parameter, "ds_numel", 0)
    return parameter.numel() or whole


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        msg = f"The status is that of a model, a torch.nn.Module; this is a {type(model).__name__}."
        raise StatusError(msg)


def _status_of(path: str, layer: BaseTunerLayer) -> TunerLayerStatus:
    names = layer.available_adapters
    return TunerLayerStatus(
        name=path,
        module_type=repr(layer).partition("(")[0],
        enabled=not layer.disable_adapters,
        active_adapters=layer.active_adapters,
        merged_adapters=list(layer.merged_adapters),
        requires_grad={name: _trains(tensors) for name in names if (tensors := [*layer.trainable_tensors(name)])},
        available_adapters=names,
        devices={name: sorted({t.device.type for t in layer.adapter_tensors(name).values()}) for name in names},
        quantization_backend=layer.site.backend if isinstance(layer, AdaptedLayer) else None,
    )


def _trains(tensors: Iterable[Tensor]) -> bool | Irregular:
    found = {tensor.requires_grad for tensor in tensors}
    return found.pop() if len(found) == 1 else "irregular"


def _gathered(dicts: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return by key what several dicts hold under it."""
    found: dict[str, list[Any]] = defaultdict(list)
    for key, value in _items(dicts):
        found[key].append(value)
    return dict(found)


def _items(dicts: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    return (item for one in dicts for item in one.items())
