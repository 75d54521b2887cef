"""Adding the product of two small factors to a layer's output, without the matrix that they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunerkit.sites import plain_parameters

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tunerkit.rows import Groups


def add_low_rank(y: Tensor, x: Tensor, down: nn.Module, up: nn.Module, scaling: float | Tensor) -> Tensor:
    """Return `y + scaling * up(down(x))` without building the matrix `up.weight @ down.weight`.

    The small factors are cast to the dtype of what they meet, not the activations to the dtype of the factors. Where
    calling a factor is more than a product with its weight (a convolution, a bias, a hook), it is called.

    Args:
        y: The layer's output, ... x out.
        x: The layer's input, ... x in.
        down: The factor with weight rank x in.
        up: The factor with weight out x rank.
        scaling: The factor before the product; a tensor of one number where a compiled model must not depend on it.

    Returns:
        The sum, of the shape and dtype of `y`, which is not changed.
    """
    weights = plain_weights((down, up))
    if weights is None:
        return y + scaling * _call(up, _call(down, x)).to(y.dtype)
    (a, b), dtype = weights, y.dtype
    hidden = F.linear(x, a if a.dtype is x.dtype else a.to(x.dtype))
    if hidden.dtype is not dtype:
        hidden = hidden.to(dtype)
    if b.dtype is not dtype:
        b = b.to(dtype)
    if isinstance(scaling, Tensor):
        hidden, scaling = hidden * scaling.to(dtype), 1.0
    if y.dim() == 2:  # noqa: PLR2004 - what addmm takes; asking costs less than a view that changes nothing
        return torch.addmm(y, hidden, b.t(), alpha=scaling)
    rows = torch.addmm(y.reshape(-1, y.shape[-1]), hidden.reshape(-1, hidden.shape[-1]), b.t(), alpha=scaling)
    return rows.view(y.shape)


def add_low_rank_rows(
    y: Tensor,
    x: Tensor,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scalings: Sequence[float | Tensor],
    groups: Groups,
) -> Tensor:
    """Return `add_low_rank` of each row with factors of its own, all rows at once.

    The factors are filled up with zeros to the largest rank. Rows of one group meet its factors together, the groups
    filled up to equal sizes for that; where this would more than double the rows, each gets a copy of its factors.

    Args:
        y: The layer's output, rows x ... x out.
        x: The layer's input, rows x ... x in.
        downs: For each group its factor rank x in: `plain_weights` of what holds them.
        ups: For each group its factor out x rank.
        scalings: The factors before the products.
        groups: The rows by adapter.

    Returns:
        The sum, of the shape and dtype of `y`, which is not changed.
    """
    ranks = [down.size(0) for down in downs]
    bank_a, bank_b = _bank(downs, ranks, dim=0).to(x.dtype), _bank(ups, ranks, dim=1).to(y.dtype)
    alpha, scales = scalings[0], None
    if isinstance(alpha, Tensor) or len(set(scalings)) > 1:  # a tensor differs from all others
        scales = torch.stack([torch.as_tensor(scaling).to(y) for scaling in scalings])[:, None, None]
        alpha = 1.0
    count, size = len(downs), max(groups.sizes)
    if count * size > 2 * len(groups.order):
        which = groups.position_of_rows(x.device)
        bank_a, bank_b = bank_a.index_select(0, which), bank_b.index_select(0, which)
        scales = None if scales is None else scales.index_select(0, which)
        return _add_in_banks(y, x, bank_a, bank_b, scales, alpha)
    positions = range(count)
    rows = groups.rows(positions, x.device, size)
    sorted_y, sorted_x = (t.index_select(0, rows).view(count, -1, *t.shape[1:]).flatten(1, -2) for t in (y, x))
    added = _add_in_banks(sorted_y, sorted_x, bank_a, bank_b, scales, alpha)
    return groups.join([positions], [size], [added.view(-1, *y.shape[1:])])  # type: ignore[no-any-return]


def _add_in_banks(y: Tensor, x: Tensor, bank_a: Tensor, bank_b: Tensor, scales: Tensor | None, alpha: float) -> Tensor:
    """Return the sum for batches x ... with factors, and perhaps a scale, for each of the batches."""
    hidden = torch.bmm(x.reshape(x.shape[0], -1, x.shape[-1]), bank_a.mT).to(y.dtype)
    if scales is not None:
        hidden = hidden * scales
    rows = y.reshape(y.shape[0], -1, y.shape[-1])
    return torch.baddbmm(rows, hidden, bank_b.mT, alpha=alpha).view(y.shape)


def plain_weights(factors: Iterable[nn.Module]) -> list[Tensor] | None:
    """Return the weights of factors if products with them are all that calling the factors is, otherwise None.

    Args:
        factors: The factors. One with a bias, a hook, or a `forward` other than that of `nn.Linear` has to be called.
    """
    weights: list[Tensor] = []
    for factor in factors:
        parameters = plain_parameters(factor)
        if parameters is None or parameters["bias"] is not None or (weight := parameters["weight"]) is None:
            return None
        weights.append(weight)
    return weights


def _bank(weights: Sequence[Tensor], ranks: Sequence[int], dim: int) -> Tensor:
    """Stack the weights of factors, filled up with zeros to the largest rank, which is their size in a dimension."""
    largest = max(ranks)
    if min(ranks) < largest:
        missing = [largest - rank for rank in ranks]
        pads = [(0, 0, 0, more) if dim == 0 else (0, more) for more in missing]
        weights = [F.pad(weight, pad) for weight, pad in zip(weights, pads, strict=True)]
    return torch.stack(list(weights))


def _call(factor: nn.Module, x: Tensor) -> Tensor:
    weight = factor._parameters.get("weight")
    return factor(x if weight is None or not weight.is_floating_point() else x.to(weight.dtype))  # type: ignore[no-any-return]
