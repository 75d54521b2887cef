"""Principal components of rows that arrive batch by batch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tunerkit_lora.inits.svd import lowrank_svd

_ITERATIONS = 4
"""Of the search for components among twice as many, as in PEFT; enough for all that are kept."""


class IncrementalPCA:
    """The leading principal components of all rows seen so far, in the memory of one batch; it does not change.

    From "Incremental Learning for Robust Visual Tracking" (Ross and others, 2008): the components so far, each as long
    as its singular value, stand for the rows they were made from, and one more row for the move of the mean.

    Args:
        count: How many components to keep.

    Attributes:
        components: The components, count x features, orthonormal, the one that explains most first.
        singular_values: How long the rows are along each of them.
        explained: The share of the variance of all rows along each of them.
    """

    components: Tensor
    singular_values: Tensor
    explained: Tensor

    def __init__(self, count: int) -> None:
        self.count = count
        self.rows = 0
        self._mean: Tensor
        self._spread: Tensor

    def with_rows(self, batch: Tensor) -> IncrementalPCA:
        """Return the components of these rows and all that were seen before.

        Args:
            batch: Rows x features; at least `count` of either.
        """
        batch = batch.float()
        new, mean = len(batch), batch.mean(0, dtype=torch.float64)
        centred = batch - mean.to(batch.dtype)
        spread = centred.square().sum(dtype=torch.float64)
        if self.rows:
            total = self.rows + new
            shift = (self.rows * new / total) ** 0.5 * (self._mean - mean)
            old = self.singular_values[:, None] * self.components
            centred = torch.cat([old, centred, shift[None].to(batch.dtype)])
            spread = spread + self._spread + shift.square().sum()
            mean = (self._mean * self.rows + mean * new) / total
        _, s, vh = lowrank_svd(centred, 2 * self.count, _ITERATIONS)
        # Of the two directions of a component the one in which its largest element is positive, for comparisons.
        largest = vh.gather(1, vh.abs().argmax(1, keepdim=True))
        made = IncrementalPCA(self.count)
        made.components = (vh * largest.sign())[: self.count]
        made.singular_values = s[: self.count]
        made.explained = (s.square() / spread)[: self.count]
        made.rows, made._mean, made._spread = self.rows + new, mean, spread
        return made


@functools.cache
def no_rows(count: int) -> IncrementalPCA:
    """Return the components before any row was seen, the same object for the same count."""
    return IncrementalPCA(count)
