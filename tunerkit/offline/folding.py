"""Folding the adapters of one layer of a skeleton into the layer's real tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tunerkit.adapter import AdditiveAdapter
from tunerkit.errors import MergeError
from tunerkit.folding import fold
from tunerkit.sites import make_on_meta

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from tunerkit.adapted_layer import AdaptedLayer
    from tunerkit.adapter import Adapter
    from tunerkit.config import PeftConfig
    from tunerkit.sites import Site

_BLOCK = 1 << 20
"""How many numbers are added up at once."""


def fold_layer(layer: AdaptedLayer, tensors: Mapping[str, Tensor], config: PeftConfig) -> dict[str, Tensor]:
    """Return the parameters of a layer that its adapters change, with them folded in.

    The given tensors are written over where that saves memory, so they are good for this one call.

    Args:
        layer: A layer of the skeleton, whose own parameters are on the meta device.
        tensors: The layer's parameters by name, with their data.
        config: The adapters' config.

    Raises:
        MergeError: The result would hold NaN or infinities, or parameters that the base model does not have.
    """
    site = layer.site.with_parameters(tensors)
    adapters = [_derived(layer.adapters[name], site, config) for name in layer.active_adapters]
    with torch.no_grad():
        change = _only_change(adapters, site)
        if change is not None:
            _add(site.weight, change)
            folded = {site.weight_name: tensors[site.weight_name]}
        else:
            folded = {
                name: tensor for name, tensor in fold(site, site, adapters, safe=False).items() if tensor is not None
            }
        for name, tensor in folded.items():
            full = f"{layer.site.name}.{name}" if layer.site.name else name
            _check_same_form(full, tensor, tensors.get(name))
            check_finite(full, tensor)
    return folded


def _derived(adapter: Adapter, site: Site, config: PeftConfig) -> Adapter:
    """Return an adapter with what it derives from the layer's weight, which the skeleton does not have."""
    if not any(buffer.is_meta for buffer in adapter.buffers()):
        return adapter
    made = make_on_meta(lambda: type(adapter)(site, config))
    made.load_state_dict(adapter.state_dict(), assign=True)
    if adapter.part is not None:
        made.join(adapter.part)
    return made


def _only_change(adapters: Sequence[Adapter], site: Site) -> Tensor | None:
    """Return what is added to the weight if folding is no more than that, and can be done in the tensor given."""
    if len(adapters) != 1 or site.weight.data_ptr() != site.stored.data_ptr():
        return None
    adapter = adapters[0]
    if not isinstance(adapter, AdditiveAdapter) or type(adapter).merged is not AdditiveAdapter.merged:
        return None
    return adapter.delta(site) if adapter.delta_bias(site) is None else None


def _add(weight: Tensor, delta: Tensor) -> None:
    """Add to a weight in place, block by block; a weight of half precision in float32, rounded once."""
    rows = max(1, _BLOCK // max(1, weight[:1].numel()))
    for own, change in zip(torch.split(weight, rows), torch.split(delta.reshape(weight.shape), rows), strict=True):
        exact = own.float() if own.dtype in (torch.float16, torch.bfloat16) else own
        own.copy_(exact + change)


def _check_same_form(name: str, tensor: Tensor, before: Tensor | None) -> None:
    if before is None or before.shape != tensor.shape:
        found = "no such tensor" if before is None else f"one of shape {tuple(before.shape)}"
        msg = (
            f"With the adapter the model would have {name!r} of shape {tuple(tensor.shape)}, and the base model has "
            f"{found}, so transformers could not load what was written. Keep it as an adapter."
        )
        raise MergeError(msg)
    if tensor.is_meta:
        msg = (
            f"Folding into {name!r} needs more of the base model than this layer. Load the model, call "
            "merge_and_unload() and save that."
        )
        raise MergeError(msg)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise `MergeError` if a tensor that is to be written holds NaN or infinities."""
    if not all(torch.isfinite(block).all() for block in torch.split(tensor.reshape(-1), _BLOCK)):
        msg = f"Merging would put NaN or infinities into {name!r}, so nothing was written. Check the adapter."
        raise MergeError(msg)
