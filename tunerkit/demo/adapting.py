"""All that the demo asks of tunerkit: choose a method, configure it, attach, save, load and merge it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from torch import nn

from tunerkit import PeftModel, get_peft_model
from tunerkit.config import built_settings
from tunerkit.demo.errors import DemoError
from tunerkit.errors import TargetError, TunerkitError
from tunerkit.naming import closest, listing
from tunerkit.plugins import get_method, method_ids

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from tunerkit import PeftConfig


def choose_method(name: str | None) -> str:
    """Return the id of the method to show.

    Args:
        name: The method that was asked for; if `None`, the only one that is installed is taken.

    Raises:
        DemoError: No name was given and not exactly one method is installed.
        UnknownMethodError: No installed package offers the method.
        PluginError: The method's package cannot be used.
    """
    if name is not None:
        return get_method(name).id
    methods = method_ids()
    if not methods:
        msg = "No method is installed, so there is nothing to train. From a checkout: pip install ./plugins/<package>"
        raise DemoError(msg)
    if len(methods) > 1:
        msg = "Several methods are installed. Say which one:"
        msg += "".join(f"\n  tunerkit demo --method {method}" for method in methods)
        raise DemoError(msg)
    return get_method(methods[0]).id


def parse_settings(items: Iterable[str]) -> dict[str, Any]:
    """Read `KEY=VALUE` texts; a value is JSON where it can be read as that (`8`, `true`, `["query"]`), else text.

    Raises:
        DemoError: A text is not of that form, or a key is given twice.
    """
    settings: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        key = key.strip()
        if not (key and equals):
            msg = f"--set takes KEY=VALUE, such as --set 'target_modules=[\"query\"]'; {item!r} is not of that form."
            raise DemoError(msg)
        if key in settings:
            msg = f"--set gives {key!r} twice: {json.dumps(settings[key])} and {value}. Give it once."
            raise DemoError(msg)
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    return settings


def make_config(method: str, settings: Mapping[str, Any]) -> PeftConfig:
    """Make a method's config.

    Args:
        method: The method's id.
        settings: Fields of its config that differ from the defaults.

    Raises:
        DemoError: The config has no such field.
        ConfigError: A value has the wrong type or is out of range.
    """
    config_class = get_method(method).method.config
    fields = {field.name for field in dataclasses.fields(config_class) if field.init}
    for key in settings:
        if key not in fields:
            built = built_settings(config_class)
            near = closest(key, built)
            hint = f"Did you mean {listing(near)}? " if near else ""
            msg = f"The method {method!r} has no setting {key!r}. {hint}Its settings are: {', '.join(built)}."
            raise DemoError(msg)
    return config_class(**settings)


def attach(model: nn.Module, config: PeftConfig) -> PeftModel:
    """Attach an adapter.

    Raises:
        DemoError: The method has no default targets for this model and the config names none, or none that are there.
        TunerkitError: The config does not fit the model.
    """
    try:
        return get_peft_model(model, config)
    except TunerkitError as error:
        settings = vars(config)
        if "target_modules" not in settings or (settings["target_modules"] and not isinstance(error, TargetError)):
            raise
        names = linear_names(model)
        msg = (
            f"{error}\nSay what to adapt, for example: --set 'target_modules={json.dumps(names[:2])}'\n"
            f"The names of this model's linear layers end in: {', '.join(names)}."
        )
        raise DemoError(msg) from error


def linear_names(model: nn.Module) -> list[str]:
    """Return the last parts of the names of a model's linear layers, each once, in the model's order."""
    names = (name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return list(dict.fromkeys(names))


def adapted_modules(model: PeftModel) -> list[str]:
    """Return the paths of the modules that were adapted."""
    return list(model.base_model.targeted_module_names)


def summarise(paths: Iterable[str]) -> list[tuple[str, int]]:
    """Put paths that differ in their numbers only into one, with `*` for the number, and count them."""
    return list(Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", path) for path in paths).items())


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return how many numbers are trained, and how many there are in all."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def save(model: PeftModel, folder: Path) -> None:
    """Write the adapter's checkpoint."""
    model.save_pretrained(str(folder))


def load(base: nn.Module, folder: Path) -> PeftModel:
    """Load a checkpoint into a fresh base model."""
    return PeftModel.from_pretrained(base, str(folder))


def merge(model: PeftModel) -> nn.Module:
    """Fold the adapter into the base model's own weights, and return that model, which then needs no tunerkit."""
    merged: nn.Module = model.merge_and_unload()
    return merged
