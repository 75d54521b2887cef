"""A weight and what is added to it, put together in blocks of rows, so that little besides the result is there."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

HALF = (torch.float16, torch.bfloat16)
"""The dtypes in which nothing is added up."""

_BLOCK = 1 << 18
"""How many numbers are added up at once."""


class Product(NamedTuple):
    """A change of a weight that is `scaling * left @ right`; it is added without being there itself.

    Attributes:
        left: A factor with a row for each row of the weight.
        right: The other factor, with as many columns as the weight has when it is flattened to a matrix.
        scaling: The factor before the product.
        shape: The shape of the weight.
    """

    left: Tensor
    right: Tensor
    scaling: float | Tensor
    shape: tuple[int, ...]

    @property
    def is_meta(self) -> bool:
        """Whether there are no numbers in it."""
        return self.left.is_meta or self.right.is_meta

    def split(self, rows: int) -> list[Product]:
        """Return it as products for that many rows each."""
        return [self._replace(left=left, shape=(len(left), *self.shape[1:])) for left in self.left.split(rows)]  # type: ignore[no-untyped-call]

    def added_to(self, weight: Tensor) -> Tensor:
        """Return a weight with it, in the wider of the dtypes of the weight and the factors."""
        left, right, alpha, dtype = self.left, self.right, self.scaling, weight.dtype
        if not left.dtype is right.dtype is dtype:
            dtype = torch.promote_types(torch.promote_types(left.dtype, right.dtype), dtype)
            left, right, weight = left.to(dtype), right.to(dtype), weight.to(dtype)
        if isinstance(alpha, Tensor):
            left, alpha = left * alpha, 1.0
        if weight.dim() == 2:  # noqa: PLR2004 - what addmm takes
            return torch.addmm(weight, left, right, alpha=alpha)
        return torch.addmm(weight.flatten(1), left, right, alpha=alpha).view(weight.shape)


Change: TypeAlias = "Tensor | Product"
"""What is added to a weight, in the shape in which the weight is stored."""


def rows_at_once(shape: Sequence[int]) -> int:
    """Return how many rows of a tensor are added up at once."""
    return max(1, _BLOCK // max(1, math.prod(shape[1:])))


@overload
def split_rows(change: Tensor) -> Sequence[Tensor]: ...
@overload
def split_rows(change: Change) -> Sequence[Change]: ...
def split_rows(change: Change) -> Sequence[Change]:
    """Return a tensor, or a change, as blocks of rows."""
    rows = rows_at_once(change.shape)
    if isinstance(change, Product):
        return change.split(rows)
    return torch.atleast_1d(change).split(rows)  # type: ignore[no-any-return, no-untyped-call]


def add_up(weight: Tensor, changes: Sequence[Change]) -> Tensor:
    """Return a weight, or some rows of it, with what is added; half precision is added in float32 and rounded once."""
    exact = weight.float() if weight.dtype in HALF else weight
    for change in changes:
        exact = change.added_to(exact) if isinstance(change, Product) else exact + change
    return exact if exact.dtype is weight.dtype else exact.to(weight.dtype)


def sum_of(weight: Tensor, changes: Sequence[Change]) -> Tensor:
    """Return a weight with what is added, block by block: to the last bit what `add_up` returns for the blocks."""
    if weight.numel() <= _BLOCK:
        return add_up(weight, changes)
    total = torch.empty_like(weight)
    for place, own, *added in zip(*(split_rows(tensor) for tensor in (total, weight, *changes)), strict=True):
        place.copy_(add_up(own, added))
    return total
