"""`LowRankAdapter`: what the LoRA adapters of all kinds of layers have in common."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tunerkit.adapter import AdditiveAdapter

if TYPE_CHECKING:
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
        self.r = config.rank_for(site.settings_name)
        self.lora_alpha = config.alpha_for(site.settings_name)
        self.use_rslora = config.use_rslora
        self.scaling = self.initial_scaling
        self.lora_dropout = config.lora_dropout
        self.lora_bias = config.lora_bias

    @property
    def initial_scaling(self) -> float:
        """The scale that follows from rank and alpha."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
