"""Factors that are those of another adapter, the other way round: for layers that share a weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor


class Transposed(nn.Module):
    """A linear layer without bias whose weight is the transpose of a parameter that another adapter holds.

    It is the very parameter that stands here, under the name `weight`: so the two stay one when the model is copied,
    pickled, moved or trained. What is read as `weight` is a view of it.

    Args:
        parameter: The parameter, inputs x outputs.
    """

    bias: None = None

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self._parameters["weight"] = parameter
        self.in_features, self.out_features = parameter.shape

    @property
    def weight(self) -> Tensor:
        """The weight, outputs x inputs."""
        return self._parameters["weight"].t()  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        """Return the product of the weight with an input, ... x inputs."""
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, tied"
