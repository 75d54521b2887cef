"""Which modules a config means: PEFT's rules for names, suffixes, patterns and layer numbers, and "all-linear"."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from tunerkit.config import TaskType
from tunerkit.layer import BaseTunerLayer, is_layer, stack_at
from tunerkit.model_config import embedding_layers
from tunerkit.naming import PREFIX, uncompiled
from tunerkit.sites import site_class

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from torch import nn

    from tunerkit.config import PeftConfig

Place: TypeAlias = "tuple[nn.Module, nn.Module, str, str | None]"
"""What stands at a place, its parent, its name in it, and the one parameter that is meant, if it is one."""

ModulePlace: TypeAlias = "tuple[str, nn.Module, nn.Module, str]"
"""A module's path, the module, its parent and its name in it."""

Value = TypeVar("Value")

ALL_LINEAR = "all-linear"
HEADS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""The names of the new heads that transformers' models have for a task."""


def match_name(targets: str | Collection[str] | None, key: str) -> str | re.Match[str] | None:
    """Return what of `targets` matches a module's path: the pattern's match, or the entry.

    Text is a pattern for the whole path. Of a list, an entry is the whole path or the end of it after a dot.
    """
    if isinstance(targets, str):
        return re.fullmatch(targets, key)
    dot, ending = "." if targets else "", key
    while dot:  # not by `endings`, which costs more than the looking up, and a plan asks this of every module
        if ending in targets:  # type: ignore[operator]
            return ending
        _, dot, ending = ending.partition(".")
    return None


def endings(path: str) -> Iterator[str]:
    """Go through a path and what is left of it after each of its dots."""
    dot = "."
    while dot:
        yield path
        _, dot, path = path.partition(".")


def paths_above(path: str) -> Iterator[str]:
    """Go through the paths of the modules in which a module stands, from the outermost to its own."""
    parts = path.split(".")
    return (".".join(parts[: index + 1]) for index in range(len(parts)))


def match_target(config: PeftConfig, key: str) -> str | re.Match[str] | None:
    """Return what of a config's targets matches a module's path, or None if nothing does or it is excluded.

    Where `layers_to_transform` chooses layers, an entry of a list of targets means modules of these layers only, unless
    it is the module's whole path.

    Args:
        config: The completed config.
        key: The module's path in the model.

    Returns:
        The entry of `target_modules` that matches, or the match where `target_modules` is one pattern.
    """
    if match_name(getattr(config, "exclude_modules", None), key) is not None:
        return None
    found = match_name(getattr(config, "target_modules", None), key)
    if not isinstance(found, str) or found == key:
        return found
    layers = LayerChoice.of(config)
    return found if layers is None or layers.has(key) else None


@dataclass(frozen=True)
class LayerChoice:
    """Which of a model's repeated layers a config means: `layers_to_transform` and `layers_pattern`.

    A layer's number stands in a module's path after a name: 3 in `model.layers.3.mlp.up_proj`. Without a pattern for
    that name it is the first number after any name, so that the number of an expert within a layer is not taken for it.

    Attributes:
        numbers: The numbers of the layers.
        patterns: Regexes for the name before the number; the first that fits decides.
    """

    numbers: tuple[int, ...]
    patterns: tuple[str, ...]

    @classmethod
    def of(cls, config: PeftConfig) -> LayerChoice | None:
        """Return what a config chooses, or None if it means all layers."""
        numbers: list[int] | int | None = getattr(config, "layers_to_transform", None)
        if numbers is None or numbers == [] or isinstance(getattr(config, "target_modules", None), str):
            return None
        patterns: list[str] | str = getattr(config, "layers_pattern", None) or []
        return cls(
            (numbers,) if isinstance(numbers, int) else tuple(numbers),
            (patterns,) if isinstance(patterns, str) else tuple(patterns),
        )

    def has(self, key: str) -> bool:
        """Return whether a module's path leads into one of the layers."""
        found = self.find(key)
        return found is not None and found[0] in self.numbers

    def find(self, key: str) -> tuple[int, str] | None:
        """Return the number of the layer into which a path leads and the pattern that found it, or None."""
        for pattern in self.patterns or (r"[^.]*",):
            found = re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", key)
            if found is not None:
                return int(found["idx"]), pattern
        return None


def wants_all_linear(config: PeftConfig) -> bool:
    """Return whether a config targets all linear layers."""
    targets = getattr(config, "target_modules", None)
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def all_linear(model: nn.Module, config: PeftConfig) -> set[str]:
    """Return the paths of all linear layers that can be adapted, but for the model's output layer."""
    heads = _output_layers(model, config)
    modules = dict(modules_outside_adapters(model))
    # Of what other adapters train as a whole only their copies are run.
    taken = {key for key, module in modules.items() if is_layer(module) and not module.targeted}
    return {
        key
        for key, module in modules.items()
        if is_linear(module) and bare(module) not in heads and taken.isdisjoint(paths_above(key))
    }


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer that can be adapted, below adapters or not."""
    base = bare(module)
    kind = site_class(type(base))
    return kind is not None and kind.kind == "linear" and kind.takes(base) is None and kind.alone(base) is None


def correct_orientation(config: PeftConfig, modules: list[nn.Module]) -> tuple[str, ...]:
    """Let a config that says how linear layers store their weights say it right for modules that are to be adapted.

    Of a mixture the last one counts, as in PEFT.

    Returns:
        What was corrected, in words.
    """
    says = getattr(config, "fan_in_fan_out", None)
    last = None if says is None else next((module for module in reversed(modules) if is_linear(module)), None)
    if last is None:
        return ()
    kind = type(bare(last))
    site = site_class(kind)
    transposed = site is not None and site.transposed
    if transposed == says:
        return ()
    config.fan_in_fan_out = transposed  # type: ignore[attr-defined]
    stored = "in x out" if transposed else "out x in"
    return (f"fan_in_fan_out={says} does not hold for the targeted {kind.__name__}, which stores its weight {stored}",)


def _output_layers(model: nn.Module, config: PeftConfig) -> list[Any]:
    _, output = embedding_layers(model)
    if output is not None:
        return [bare(output)]
    if config.task_type == TaskType.SEQ_CLS:
        # Transformers' classifiers call their new head one of these, and it is trained whole.
        return [model._modules[name] for name in HEADS["SEQ_CLS"] if name in model._modules]
    return []


def bare(module: nn.Module) -> nn.Module:
    """Return the module itself, or the layer below all adapters where it is a layer with adapters."""
    # What has no children is no such layer, and most modules have none.
    return module.get_base_layer() if module._modules and is_layer(module) else module


def modules_outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Go through the modules below the model by path, not entering layers with adapters."""
    yield from ((key, module) for key, module, _, _ in places(model))


def places(module: nn.Module, prefix: str = "") -> list[ModulePlace]:
    """Return the places of the modules below: path, module, parent and name in it.

    A module that stands at several places comes once for each. Layers with adapters are not entered, other than for the
    children that their base layer has.
    """
    return places_and_bases(module, prefix)[0]


def places_and_bases(module: nn.Module, prefix: str = "") -> tuple[list[ModulePlace], list[nn.Module]]:
    """Return what `places` does, and what stands at each of the places below all adapters."""
    found: list[ModulePlace] = []
    bases: list[nn.Module] = []
    _find_places(module, f"{prefix}." if prefix else "", found, bases)
    return found, bases


def _find_places(module: nn.Module, prefix: str, found: list[ModulePlace], bases: list[nn.Module]) -> None:
    for name, child in module._modules.items():
        if child is None:
            continue
        key = prefix + name
        found.append((key, child, module, name))
        below = bare(child)
        bases.append(below)
        if below._modules:
            _find_places(below, f"{key}.", found, bases)


def adapted_places(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Go through the layers with adapters, by the paths that their modules have in a model without adapters.

    Layers that stand on one another have the same path, and the uppermost comes first. Each layer comes once.
    """
    seen: set[int] = set()
    for key, module, _, _ in places(model):
        for layer in stack_at(module):
            if id(layer) not in seen:
                seen.add(id(layer))
                yield key, layer


def exact_targets(model: nn.Module, paths: Collection[str]) -> set[str] | str:
    """Return as `target_modules` what means the modules at these paths and no others.

    Args:
        model: The model.
        paths: The paths.
    """
    # A name also means every path that ends in it; a pattern means the whole path.
    meant = {key for key, _ in modules_outside_adapters(model) if match_name(paths, key) is not None}
    return set(paths) if meant <= set(paths) else "|".join(map(re.escape, paths))


def base_path(path: str, modules: Collection[str]) -> str:
    """Return a layer's path in a checkpoint as the path that its module has in a model without adapters.

    Args:
        path: The path, with the names under which layers with adapters hold what they stand on.
        modules: The paths of the model's modules, of which one may itself have such a name.
    """
    found = ""
    for part in path.split("."):
        longer = f"{found}.{part}" if found else part
        if part != BaseTunerLayer.base_name or longer in modules:
            found = longer
    return found


def parameter_places(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module, str, str | None]]:
    """Go through the parameters of the modules below: path of the module, and what `place_of_parameter` returns."""
    for key, module, parent, name in places(model):
        for parameter in bare(module)._parameters:
            yield key, *place_of_parameter(module, parent, name, parameter)


def place_of_parameter(module: nn.Module, parent: nn.Module, name: str, parameter: str) -> Place:
    """Return where a parameter of what stands at a place is adapted, or is to be.

    A layer that adapts this very parameter may stand below layers that adapt others of the module.
    """
    layer, upper, upper_name = module, parent, name
    while is_layer(layer):
        if getattr(layer, "parameter_name", None) == parameter:
            return layer, upper, upper_name, parameter
        upper, upper_name, layer = layer, layer.base_name, getattr(layer, layer.base_name)
    return module, parent, name, parameter


def keys_in_state(model: nn.Module, state_dict: Collection[str], entries: Collection[str], prefix: str) -> set[str]:
    """Return the paths of the modules for which a checkpoint's keys hold tensors of adapters.

    Args:
        model: The model.
        state_dict: The checkpoint's keys.
        entries: The names of the entries in which the method's adapters hold their tensors.
        prefix: What such names start with, for methods that declare no entries.
    """
    known = {uncompiled(path): path for path, _ in modules_outside_adapters(model)}
    found: set[str] = set()
    for key in state_dict:
        # A model may have a `base_model.model` of its own, and then keys without PEFT's look like keys with it.
        forms = (uncompiled(key).removeprefix(PREFIX), uncompiled(key))
        holders = (base_path(path, known) for form in forms for path in _holders(form, entries, prefix))
        paths = (path for path in holders if path in known)
        found.update(known[path] for path in itertools.islice(paths, 1))
    return found


def _holders(key: str, entries: Collection[str], prefix: str) -> Iterator[str]:
    """Go through what may be the path of the layer to which a checkpoint's key belongs, the longest first."""
    parts = key.split(".")
    for index in range(len(parts) - 1, 0, -1):
        if parts[index] in entries or (prefix and parts[index].startswith(prefix)):
            yield ".".join(parts[:index])
