"""What a user of PEFT's calls tries that is not here, or not so: each is told what to do instead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from tunerkit.errors import AdapterStateError, CheckpointError, ConfigError
from tunerkit.layer import layers_in
from tunerkit.naming import closest, listing

if TYPE_CHECKING:
    from tunerkit.adapted_model import AdaptedModel


def check_model(model: object, call: str, second: object) -> nn.Module:
    """Return what was passed as a base model, if it is one.

    Args:
        model: What was passed.
        call: The call as it is meant, for the message: `get_peft_model(model, peft_config)`.
        second: What was passed after it, which may be the model.

    Raises:
        ConfigError: It is something else.
    """
    if isinstance(model, nn.Module):
        return model
    found = f"the class {model.__name__} itself" if isinstance(model, type) else f"a {type(model).__name__}"
    hint = "Make or load the base model first, and pass that."
    if isinstance(second, nn.Module):
        hint = "The arguments are swapped."
    elif isinstance(model, type):
        hint = "Make a model of it, and pass that."
    msg = f"{call} takes the base model first, a torch.nn.Module; it is {found}. {hint}"
    raise ConfigError(msg)


def own_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a call that are the base model's, and refuse those that PEFT takes for itself.

    Raises:
        ConfigError: The call is to use offsets of activated adapters.
    """
    if not any(name in arguments for name in _PEFTS):
        return arguments
    given = {name: value for name, value in arguments.items() if name not in _PEFTS or value is not None}
    for name, advice in _PEFTS.items():
        if name in given:
            value = given[name]
            msg = f"{name}={value!r} {advice}"
            raise ConfigError(msg)
    return given


_PEFTS = {
    "alora_offsets": "is not supported by this version; leave it out.",
}


def refuse_around(model: AdaptedModel) -> None:
    """Raise `AdapterStateError` if an active adapter does something around a call of the model, for other calls."""
    for name in () if model.disabled else model.active_adapters:
        part = model.parts.get(name)
        if part is not None and part.surrounds():
            msg = (
                f"generate calls the base model itself, and {type(part).__name__} does something around a call of the "
                "whole model, which would be left out. Call the model, or use disable_adapter()."
            )
            raise AdapterStateError(msg)


def refuse_adapted(model: nn.Module) -> None:
    """Raise `AdapterStateError` if a model holds adapters that another model around it looks after."""
    held = sorted({name for layer in layers_in(model) for name in layer.available_adapters})
    if held:
        msg = (
            f"The model has the adapters {listing(held)} already, of which a second PeftModel would know nothing. Call "
            "add_adapter(name, config) on the first, or take its adapters out with unload()."
        )
        raise AdapterStateError(msg)


def refuse_pickle(safe_serialization: bool) -> None:
    """Raise `CheckpointError` if a checkpoint is to be a pickle."""
    if not safe_serialization:
        msg = (
            "safe_serialization=False would write a pickle, which can run code when it is loaded. Leave it out; a "
            "reader that needs a .bin can convert the safetensors file with torch.save."
        )
        raise CheckpointError(msg)


class MissingAttributeError(AttributeError):
    """Neither a model with adapters nor its base has an attribute.

    The message is made when it is read: looking for close names is slow, and most are asked for by `hasattr`.
    """

    def __init__(self, model: nn.Module, base: nn.Module, name: str) -> None:
        super().__init__(f"{type(model).__name__} has no {name!r}.", name=name, obj=model)
        self.places = (model, base)

    def __str__(self) -> str:
        model, base = self.places
        known = [name for place in (model, getattr(model, "base_model", base), base) for name in dir(place)]
        public = sorted({name for name in known if not name.startswith("_")})
        near = [name for name in public if name.startswith(f"{self.name}_")]
        near += [name for name in closest(str(self.name), public, cutoff=0.7) if name not in near]
        hint = f" Closest: {listing(near[:3])}." if near else ""
        return f"Neither {type(model).__name__} nor the base {type(base).__name__} has {self.name!r}.{hint}"
