"""The maths of LoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch.nn.functional as F

from tunerkit.adapter import AdditiveAdapter, add_low_rank, add_low_rank_rows, have_plain_weights, linear

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from typing_extensions import Self

    from tunerkit.rows import Groups
    from tunerkit.sites import Below, Site
    from tunerkit_lora.config import LoraConfig


class LoraAdapter(AdditiveAdapter):
    """``W + s B A``: two small factors instead of a full update.

    From "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685). ``A`` is r x in and starts at random,
    ``B`` is out x r and starts at zero, so training starts from the base model; ``s`` is alpha / r, or alpha / sqrt(r)
    with rank-stabilised scaling (arXiv 2312.03732).
    """

    entries: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")

    def __init__(self, site: Site, config: LoraConfig) -> None:
        super().__init__(site, config)
        self.r, self.lora_alpha, self.scaling = config.r, config.lora_alpha, config.scaling
        self.lora_dropout = config.lora_dropout
        init = config.init_lora_weights
        shape = config.r, site.in_features
        self.lora_A = linear(
            site.normal(*shape, std=1 / config.r) if init == "gaussian" else site.kaiming_uniform(*shape)
        )
        shape = site.out_features, config.r
        self.lora_B = linear(site.zeros(*shape) if init else site.kaiming_uniform(*shape))

    def delta(self, base: Site) -> Tensor:
        """Return ``s B A``, out x in."""
        del base
        return self.scaling * (self.lora_B.weight @ self.lora_A.weight)

    def forward(self, x: Tensor, below: Below) -> Tensor:
        """Return the inherited result without building the full-size delta; only this way has dropout."""
        dropped = F.dropout(x, self.lora_dropout, self.training) if self.lora_dropout else x
        return add_low_rank(below(x), dropped, self.lora_A, self.lora_B, self.scaling)

    @classmethod
    def forward_rows(cls, adapters: Sequence[Self], x: Tensor, below: Below, groups: Groups) -> Tensor:
        """Return the inherited result with the small factors of all adapters in two products for the whole batch."""
        dropouts = {adapter.lora_dropout if adapter.training else 0.0 for adapter in adapters}
        downs, ups = [adapter.lora_A for adapter in adapters], [adapter.lora_B for adapter in adapters]
        if len(dropouts) > 1 or not have_plain_weights(*downs, *ups):
            return super().forward_rows(adapters, x, below, groups)
        rate = dropouts.pop()
        dropped = F.dropout(x, rate) if rate else x
        scalings = [adapter.scaling for adapter in adapters]
        return add_low_rank_rows(below(x), dropped, downs, ups, scalings, groups.position_of_rows(x.device))
