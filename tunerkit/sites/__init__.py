"""What a base layer is: one class of `Site` for each kind, found by the layer's type."""

from __future__ import annotations

from torch import nn

from tunerkit.sites.base import Below, Bound, Site, make_on_meta, twin
from tunerkit.sites.embedding import EmbeddingSite
from tunerkit.sites.linear import LinearSite
from tunerkit.sites.parameter import ParameterSite

__all__ = [
    "Below",
    "Bound",
    "EmbeddingSite",
    "LinearSite",
    "ParameterSite",
    "Site",
    "make_on_meta",
    "make_site",
    "register_site",
    "site_class",
    "twin",
]

_SITES: dict[type[nn.Module], type[Site]] = {nn.Linear: LinearSite, nn.Embedding: EmbeddingSite}


def register_site(layer: type[nn.Module], site: type[Site]) -> None:
    """Teach tunerkit what a type of layer is; subclasses of the type that have no site of their own are covered too."""
    _SITES[layer] = site


def site_class(layer: type[nn.Module]) -> type[Site] | None:
    """Return the class of site for a type of layer, or None if none is known."""
    for kind in layer.__mro__:
        if kind in _SITES:
            return _SITES[kind]
    return None


def make_site(module: nn.Module, name: str = "", parameter_name: str | None = None) -> Site | None:
    """Return the site that a module is, or None if its kind is not known.

    Args:
        module: The layer.
        name: Its path in the model.
        parameter_name: The one parameter of the module that is meant, if it is not the layer.
    """
    if parameter_name is not None:
        return ParameterSite(module, name, parameter_name)
    kind = site_class(type(module))
    return None if kind is None else kind(module, name)
