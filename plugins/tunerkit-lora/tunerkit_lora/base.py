"""`LowRankAdapter`: what the LoRA adapters of all kinds of layers have in common."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from tunerkit.adapter import AdditiveAdapter
from tunerkit.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from tunerkit.sites import Site
    from tunerkit_lora.config import LoraConfig


class LowRankAdapter(AdditiveAdapter):
    """An update that is a product of two small factors, times a scale.

    Attributes:
        r: The rank.
        lora_alpha: The numerator of the scale.
        use_rslora: Whether its denominator is the root of the rank.
        scaling: The scale now; it can be changed.
        lora_dropout: The probability with which each element of the input is dropped while training.
        lora_bias: Whether the second factor has a bias.
        use_dora: Whether magnitude and direction of the weight are learned apart.
    """

    use_dora: bool = False

    def __init__(self, site: Site, config: LoraConfig) -> None:
        super().__init__(site, config)
        self.r = config.rank_for(site.name)
        self.lora_alpha = config.alpha_for(site.name)
        self.use_rslora = config.use_rslora
        self.scaling = self.initial_scaling
        self.lora_dropout = config.lora_dropout
        self.lora_bias = config.lora_bias

    @property
    def initial_scaling(self) -> float:
        """The scale that follows from rank and alpha."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    # The words in which DoRA is written

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return ``A``, r x inputs, and ``B``, outputs x r, as matrices."""
        raise NotImplementedError

    def added(self, y: Tensor, x: Tensor, base: Site, gain: Tensor | None = None) -> Tensor:
        """Return an output of the layer with the update added, without a matrix of the weight's size.

        Args:
            y: The output.
            x: The input, after dropout.
            base: The bare layer.
            gain: A number for each output by which the update is multiplied.
        """
        raise NotImplementedError

    def dropped(self, x: Tensor) -> Tensor:
        """Return the input with dropout while training, otherwise the input itself."""
        return F.dropout(x, self.lora_dropout) if self.lora_dropout and self.training else x

    def along_outputs(self, vector: Tensor) -> Tensor:
        """Return a vector with a number for each output in a shape that broadcasts to the layer's output."""
        return vector

    # Checkpoints

    def standalone(self, tensors: dict[str, Tensor], initial: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Return ``[A; A0]`` and ``[B, -B0]`` for the initial factors ``A0`` and ``B0``.

        Raises:
            CheckpointError: The adapter stands on a convolution with groups.
        """
        if self.unfoldable is not None:
            msg = f"The adapter cannot be joined with its start: {self.unfoldable}. Save it as it is."
            raise CheckpointError(msg)
        before = initial or {}
        return {key: self._joined(key, tensor, before.get(key)) for key, tensor in tensors.items()}

    def _joined(self, key: str, tensor: Tensor, before: Tensor | None) -> Tensor:
        entry, _, leaf = key.partition(".")
        if before is None or entry not in self.entries[:2]:
            return tensor
        before = before.to(tensor)
        if leaf == "bias":
            return tensor - before
        return torch.cat([tensor, before]) if entry == self.entries[0] else torch.cat([tensor, -before], 1)
