"""Finding out in what an adapter's `forward` and what it returns from `merged` disagree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tunerkit.testing.comparing import first_tensor, is_close

if TYPE_CHECKING:
    from tunerkit.adapter import Adapter
    from tunerkit.sites import Below

_AFFINE = frozenset({"linear", "conv1d", "conv2d", "conv3d"})
"""The kinds of sites whose output for zeros is the bias, and otherwise that plus something linear in the input."""


def where_they_disagree(adapter: Adapter, x: Tensor, below: Below, tolerance: float) -> str:
    """Return where to look for the reason, or nothing if no simple one is known.

    Args:
        adapter: The adapter.
        x: The layer's input.
        below: What the adapter stands on.
        tolerance: The greatest difference that counts as none, absolute and relative.
    """
    with torch.no_grad():
        weight, bias = adapter.merged(below)
        own = first_tensor(adapter.forward(x, below))

        def agree(one: Tensor, other: Tensor) -> bool:
            return is_close(one, other, tolerance)

        change = weight - below.weight
        if change.dim() == 2:  # noqa: PLR2004 - a matrix
            turned = below.weight + change.reshape(change.shape[::-1]).mT
            if agree(own, first_tensor(below.run(x, turned, bias))):
                return "they agree when what `merged` adds to the weight is transposed"
        if below.base.kind not in _AFFINE:
            return ""
        merged, before = first_tensor(below.run(x, weight, None)), first_tensor(below.run(x, below.weight, None))
        own_bias = first_tensor(adapter.forward(torch.zeros_like(x), below))
        if agree(own - own_bias, merged):
            return "they agree in what the weight does: look at the bias that `merged` returns"
        if not agree(own_bias, first_tensor(below.run(torch.zeros_like(x), weight, bias))):
            return ""
        added, folded = own - own_bias - before, merged - before
        factor = float((added * folded).sum() / (folded * folded).sum())
        if agree(added, factor * folded):
            return (
                "they agree in the bias, and what `forward` adds to what the weight does is "
                f"{factor:.4g} times what `merged` adds: look at the scale"
            )
        return "they agree in the bias: look at the weight that `merged` returns"
