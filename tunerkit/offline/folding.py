"""Folding the adapters of one layer of a skeleton into the layer's real tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tunerkit.errors import MergeError
from tunerkit.folding import changes_of, fold
from tunerkit.sites import make_on_meta
from tunerkit.sums import add_up, split_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from tunerkit.adapted_layer import AdaptedLayer
    from tunerkit.adapter import Adapter
    from tunerkit.config import PeftConfig
    from tunerkit.sites import Site
    from tunerkit.sums import Change


def fold_layer(
    layer: AdaptedLayer,
    tensors: Mapping[str, Tensor],
    rows: Callable[[str], Iterable[Tensor]],
    config: PeftConfig,
) -> dict[str, Iterable[Tensor]]:
    """Return the parameters of a layer that its adapters change, with them folded in, each as blocks of rows.

    What is only added to the weight is added while the blocks are asked for, to rows that are read then. So the weight
    is never there as a whole, unless an adapter computes with it.

    Args:
        layer: A layer of the skeleton, whose own parameters are on the meta device.
        tensors: The layer's parameters by name, with their data; not kept.
        rows: Reads one of them by its name, as the blocks of `tunerkit.sums.split_rows`.
        config: The adapters' config.

    Raises:
        MergeError: The result would hold parameters that the base model does not have; or, while the blocks are asked
            for, NaN or infinities.
    """
    site = layer.site.with_parameters(tensors)
    adapters = [_derived(layer.adapters[name], site, config) for name in layer.active_adapters]
    prefix = f"{layer.site.name}." if layer.site.name else ""
    folded: dict[str, Iterable[Tensor]] = {}
    with torch.no_grad():
        changes = changes_of(site, site, adapters)
        if changes is not None:
            name = site.weight_name
            _check_same_form(prefix + name, changes[0], tensors.get(name))
            return {name: _checked(prefix + name, _sums(rows(name), changes))}
        for name, tensor in fold(site, site, adapters, safe=False).items():
            if tensor is not None:
                _check_same_form(prefix + name, tensor, tensors.get(name))
                folded[name] = _checked(prefix + name, split_rows(tensor))
    return folded


def _sums(rows: Iterable[Tensor], changes: Sequence[Change]) -> Iterator[Tensor]:
    for own, *added in zip(rows, *map(split_rows, changes), strict=True):
        yield add_up(own, added)


def _checked(name: str, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    for block in blocks:
        check_finite(name, block)
        yield block


def _derived(adapter: Adapter, site: Site, config: PeftConfig) -> Adapter:
    """Return an adapter with what it derives from the layer's weight, which the skeleton does not have."""
    if not any(buffer.is_meta for buffer in adapter.buffers()):
        return adapter
    made = make_on_meta(lambda: type(adapter)(site, config))
    made.load_state_dict(adapter.state_dict(), assign=True)
    if "part" in adapter.__dict__:
        made.join(adapter.part)
    return made


def _check_same_form(name: str, tensor: Change, before: Tensor | None) -> None:
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
    if not all(torch.isfinite(block).all() for block in split_rows(tensor)):
        msg = f"Merging would put NaN or infinities into {name!r}, so nothing was written. Check the adapter."
        raise MergeError(msg)
