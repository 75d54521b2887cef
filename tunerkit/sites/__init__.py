"""What a base layer is: one class of `Site` for each kind, found by the layer's type."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from tunerkit.errors import PluginError
from tunerkit.plugins.discovery import last_scan
from tunerkit.plugins.loader import load_sites
from tunerkit.sites.attention import SHOWN, AttentionSite, OutputProjectionSite
from tunerkit.sites.base import Below, Bound, Site, is_making_on_meta, make_on_meta, twin
from tunerkit.sites.convolution import Convolution1dSite, Convolution2dSite, Convolution3dSite, ConvolutionSite
from tunerkit.sites.embedding import EmbeddingSite
from tunerkit.sites.linear import CONV1D, LinearSite, TransposedLinearSite, plain_parameters
from tunerkit.sites.parameter import ParameterSite

if TYPE_CHECKING:
    from collections.abc import Collection

    from tunerkit.plugins.discovery import Scan

__all__ = [
    "SHOWN",
    "AttentionSite",
    "Below",
    "Bound",
    "Convolution1dSite",
    "Convolution2dSite",
    "Convolution3dSite",
    "ConvolutionSite",
    "EmbeddingSite",
    "LinearSite",
    "OutputProjectionSite",
    "ParameterSite",
    "Site",
    "TransposedLinearSite",
    "in_words",
    "is_making_on_meta",
    "make_on_meta",
    "make_site",
    "plain_parameters",
    "register_site",
    "site_class",
    "twin",
]

_SITES: dict[type[nn.Module] | str, type[Site]] = {
    nn.Linear: LinearSite,
    CONV1D: TransposedLinearSite,
    nn.Embedding: EmbeddingSite,
    nn.Conv1d: Convolution1dSite,
    nn.Conv2d: Convolution2dSite,
    nn.Conv3d: Convolution3dSite,
    nn.MultiheadAttention: AttentionSite,
    nn.modules.linear.NonDynamicallyQuantizableLinear: OutputProjectionSite,
}
_TAUGHT: dict[type[nn.Module] | str, dict[str, type[Site]]] = {}
"""What packages say of the layers of a library, by who says it; what is in `_SITES` comes first."""
_FOUND: dict[type[nn.Module], type[Site] | None] = {}
"""What was found for types of layers so far: a plan asks for each module."""
_found_in: Scan | None = None
"""What was installed then."""

_WORDS = {
    "linear": "linear layers",
    "embedding": "embeddings",
    "attention": "attention layers",
    "parameter": "bare parameters",
}


def in_words(kinds: Collection[str]) -> str:
    """Return kinds of sites as text for a message."""
    dimensions = [f"{number}d" for number in (1, 2, 3) if f"conv{number}d" in kinds]
    words = [phrase for kind, phrase in _WORDS.items() if kind in kinds]
    words += [f"convolutions ({', '.join(dimensions)})"] if dimensions else []
    words += [repr(kind) for kind in sorted(kinds) if kind not in {*_WORDS, "conv1d", "conv2d", "conv3d"}]
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def register_site(layer: type[nn.Module] | str, site: type[Site]) -> None:
    """Teach tunerkit what a type of layer is; subclasses of the type that have no site of their own are covered too.

    Args:
        layer: The type, or its full name (`"library.module.Name"`) for a library that need not be installed.
        site: The class of its sites.
    """
    _SITES[layer] = site
    _FOUND.clear()


def site_class(layer: type[nn.Module]) -> type[Site] | None:
    """Return the class of site for a type of layer, or None if none is known.

    Packages that say what the layers of a library are (entry points of the group `tunerkit.sites`, named like the
    library) are imported when the first of these layers is met.

    Raises:
        PluginError: Two packages say what the type is.
    """
    global _found_in  # noqa: PLW0603 - one environment per process
    scan = last_scan()
    if scan is not _found_in:  # packages may have come
        _FOUND.clear()
        _found_in = scan
    if layer not in _FOUND:
        _FOUND[layer] = _look_up(layer)
    return _FOUND[layer]


def _look_up(layer: type[nn.Module]) -> type[Site] | None:
    for library in {kind.__module__.partition(".")[0] for kind in layer.__mro__}:
        for package in load_sites(library):
            for kind, site in package.plugin.sites.items():  # type: ignore[attr-defined]
                _TAUGHT.setdefault(kind, {})[package.offer.source] = site
    for kind in layer.__mro__:
        for name in (kind, f"{kind.__module__}.{kind.__qualname__}"):
            if name in _SITES:
                return _SITES[name]
            taught = _TAUGHT.get(name, {})
            if len(taught) > 1:
                msg = f"{' and '.join(sorted(taught))} both say what a {layer.__name__} is. Uninstall one of them."
                raise PluginError(msg)
            if taught:
                return next(iter(taught.values()))
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
