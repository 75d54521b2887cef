"""What an adapter's checkpoint may hold of the base model itself: biases that it trains, embeddings saved beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunerkit.checkpoint.state import Piece
from tunerkit.layer import BaseTunerLayer
from tunerkit.naming import uncompiled

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn


class BasePiece(Piece):
    """Tensors of a module of the base model; their names hold no adapter's."""

    def named(self, local: str) -> str:
        """Return a tensor's name below its module: the same."""
        return local


def base_modules(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, str]]:
    """Go through the modules of the base model: path in a checkpoint of an adapter, module, place.

    Only layers of the adapter itself are in the path: a checkpoint is the same whatever other adapters are there. The
    place is the path of the uppermost layer that adapts the module, and the module's own if none does.
    Modules of which the adapter has a copy are left out: the copy is trained and saved as a whole.
    """
    return _walk(model, "", "", name)


def _walk(module: nn.Module, path: str, place: str, name: str) -> Iterator[tuple[str, nn.Module, str]]:
    if isinstance(module, BaseTunerLayer):
        here = module.holds(name)
        if not (here and module.replaces):
            below = f"{path}.{module.base_name}".lstrip(".") if here else path
            yield from _walk(getattr(module, module.base_name), below, place, name)
        return
    yield path, module, place
    for child_name, child in module._modules.items():
        if child is not None:
            below = f"{path}.{child_name}".lstrip(".")
            yield from _walk(child, below, below, name)


def file_path(path: str, prefix: str) -> str:
    """Return a module's path as it stands in a checkpoint's keys."""
    return uncompiled(f"{prefix}{path}")


def repeated_keys(layers: Mapping[str, BaseTunerLayer], name: str, prefix: str) -> set[str]:
    """Return the keys under which PEFT's files may hold tensors of copied modules beside those of the copy itself.

    Args:
        layers: The layers of the base model by path; see `tuner_layers`.
        name: The adapter's name.
        prefix: What stands before the layers' paths in keys.
    """
    return {
        f"{file_path(path, prefix)}.{child}.{key}"
        for path, layer in layers.items()
        if layer.replaces and layer.holds(name)
        for key in layer.adapter_tensors(name)
        for child in (layer.base_name, *layer.adapter_layer_names)
    }
