"""Adding an adapter that is made of others of its method, for the plugins of methods that know how."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from tunerkit._typecheck import fits
from tunerkit.adapted_layer import AdaptedLayer
from tunerkit.errors import AdapterNameError, CombinationError
from tunerkit.journal import Journal
from tunerkit.layer import tuner_layers
from tunerkit.names import RESERVED_NAMES
from tunerkit.naming import check_adapter_name, listing
from tunerkit.targeting import adapted_places, exact_targets

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tunerkit.adapter import Adapter
    from tunerkit.config import PeftConfig
    from tunerkit.layer import BaseTunerLayer
    from tunerkit.tuner import BaseTuner

_WHERE = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Settings beside the targets that say which modules are adapted."""


def add_combined(
    tuner: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    fill: Callable[[str, Adapter, list[tuple[Adapter | None, float]]], None],
    **settings: Any,
) -> None:
    """Add an adapter that is made of others; it is not active yet.

    It adapts what any of the others adapts. Its config is the first one's with other targets and settings.

    Args:
        tuner: The model.
        adapters: The names of the others, all of one method.
        weights: A weight for each; negative ones take an adapter's effect away.
        adapter_name: The name of the new adapter.
        fill: Gives the new adapter its numbers on one layer. It gets the layer's path, the new adapter, and each of the
            others on this layer (None where it has none) with its weight.
        settings: What the new config has instead of the first one's settings.

    Raises:
        AdapterNameError: The name is illegal or taken.
        UnknownAdapterError: The model has none of one of the names.
        CombinationError: The adapters cannot be combined; the model is as it was.
    """
    names = check_call(tuner, adapters, weights, adapter_name)
    configs = [tuner.peft_config[name] for name in names]
    _check_configs(names, configs)
    with Journal() as journal:
        journal.note_module(tuner)
        journal.note_module(tuner.model)
        where = _targets(tuner, names, configs)
        tuner.peft_config[adapter_name] = dataclasses.replace(configs[0].copy(), **where, **settings)
        tuner.inject_adapter(tuner.model, adapter_name)
        for path, layer in tuner_layers(tuner.model):
            if not layer.holds(adapter_name):
                continue
            if isinstance(layer, AdaptedLayer):
                others = layer.adapters
                parts = [(others.get(name), float(weight)) for name, weight in zip(names, weights, strict=True)]
                fill(path, others[adapter_name], parts)
            else:
                _copy(path, layer, names, adapter_name)


def check_call(tuner: BaseTuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> list[str]:
    """Return the names of the adapters to combine, if the call makes sense; see `add_combined`.

    Raises:
        AdapterNameError: The name of the new one is illegal or taken.
        UnknownAdapterError: The model has none of one of the names.
        CombinationError: There are no names, or not one finite weight for each.
    """
    if check_adapter_name(adapter_name, RESERVED_NAMES) in tuner.peft_config:
        msg = f"There is an adapter {adapter_name!r} already, so the combination needs another name."
        raise AdapterNameError(msg)
    if isinstance(adapters, str) or not adapters:
        msg = (
            f"adapters is a list of at least one name; it is {adapters!r}. The model has {listing(tuner.peft_config)}."
        )
        raise CombinationError(msg)
    names = list(adapters)
    tuner.check_known(names)
    if len(weights) != len(names):
        msg = f"weights must be one number for each of {listing(names)}; it is {weights!r}."
        raise CombinationError(msg)
    for weight in weights:
        if not fits(weight, float) or not math.isfinite(weight):
            msg = f"weights must be finite numbers; one of them is {weight!r}."
            raise CombinationError(msg)
    return names


def _check_configs(names: list[str], configs: list[PeftConfig]) -> None:
    first = configs[0]
    for name, config in zip(names, configs, strict=True):
        if config.peft_type != first.peft_type:
            msg = (
                f"{names[0]!r} is of the type {first.peft_type} and {name!r} of {config.peft_type}; only adapters of "
                "one method can be combined into one."
            )
            raise CombinationError(msg)
        if getattr(config, "target_parameters", None):
            msg = f"{name!r} adapts bare parameters (target_parameters), which cannot be combined."
            raise CombinationError(msg)
        if getattr(config, "bias", "none") != "none":
            msg = f"{name!r} trains the base model's biases (bias={config.bias!r}), which cannot be combined."  # type: ignore[attr-defined]
            raise CombinationError(msg)


def _targets(tuner: BaseTuner, names: list[str], configs: list[PeftConfig]) -> dict[str, Any]:
    """Return the settings that make one config adapt what any of several adapts."""
    targets: list[Any] = [getattr(config, "target_modules", None) for config in configs]
    same = all(getattr(config, name, None) == getattr(configs[0], name, None) for config in configs for name in _WHERE)
    found: dict[str, Any] = {}
    if any(getattr(config, "modules_to_save", None) for config in configs):
        saved = [name for config in configs for name in getattr(config, "modules_to_save", None) or ()]
        found["modules_to_save"] = list(dict.fromkeys(saved))
    if same and all(isinstance(wanted, set) for wanted in targets):
        return {**found, "target_modules": {name for wanted in targets for name in wanted}}
    if same and all(isinstance(wanted, str) for wanted in targets):
        return {**found, "target_modules": "|".join(f"({wanted})" for wanted in dict.fromkeys(targets))}
    paths = dict.fromkeys(
        path
        for path, layer in adapted_places(tuner.model)
        if isinstance(layer, AdaptedLayer)
        and not set(names).isdisjoint(layer.available_adapters)
        and layer.site.alone(layer.get_base_layer()) is None  # else it is adapted along with another
    )
    fields = {item.name for item in dataclasses.fields(configs[0])}
    return {
        **found,
        "target_modules": exact_targets(tuner.model, paths),
        **{name: None for name in _WHERE if name in fields},
    }


def _copy(path: str, layer: BaseTunerLayer, names: list[str], adapter_name: str) -> None:
    """Give the new adapter what one of the others holds in a layer that cannot be combined, such as a copied module."""
    here = [name for name in names if layer.holds(name)]
    if len(here) > 1:
        msg = (
            f"{listing(here)} each hold a {type(layer).__name__} of their own at {path!r}, such as a module that is "
            "trained whole, and these cannot be combined. Combine adapters of which only one has it."
        )
        raise CombinationError(msg)
    mine = layer.adapter_tensors(adapter_name)
    for name in here:
        for key, tensor in layer.adapter_tensors(name).items():
            mine[key].data.copy_(tensor)
