"""What the adapter is compared with: one linear map on the frozen vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from tunerkit.demo.training import contrastive_loss, train

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

LEARNING_RATE = 1e-3


class LinearMap(nn.Module):
    """A square matrix, the identity at first, applied to sentences and functions alike: `normalize(W x)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width))

    def forward(self, vectors: Tensor) -> Tensor:
        """Map vectors of unit length to vectors of unit length, (texts, width)."""
        return nn.functional.normalize(vectors @ self.weight.T, dim=-1)


def train_linear_map(
    sentences: Tensor, lines: Tensor, batches: Sequence[slice], *, on_step: Callable[[float], None] = lambda _: None
) -> LinearMap:
    """Train a map with the adapter's loss, pairs and batches.

    Args:
        sentences: The frozen vectors of the sentences to train on, (pairs, width).
        lines: The frozen vectors of their functions, in the same order, (pairs, width).
        batches: Which pairs are in each step's batch.
        on_step: Called after each step with its loss.

    Returns:
        The map after the last step.
    """
    linear_map = LinearMap(sentences.shape[1])
    train(
        linear_map.parameters(),
        lambda batch: contrastive_loss(linear_map(sentences[batch]), linear_map(lines[batch])),
        batches,
        learning_rate=LEARNING_RATE,
        on_step=on_step,
    )
    return linear_map
