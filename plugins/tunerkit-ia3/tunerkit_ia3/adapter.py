"""The maths of IA3."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from tunerkit.adapter import Adapter

if TYPE_CHECKING:
    from tunerkit.sites import Below, Site
    from tunerkit_ia3.config import IA3Config


class IA3Adapter(Adapter):
    """``l * (W x + b)``: scales the layer's outputs, or its inputs (``W (l * x) + b``) in feed-forward layers.

    From "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning" (arXiv 2205.05638).
    ``l`` is out x 1, or 1 x in for feed-forward layers, and starts at one.
    """

    entries: ClassVar[tuple[str, ...]] = ("ia3_l",)

    def __init__(self, site: Site, config: IA3Config) -> None:
        super().__init__(site, config)
        self.is_feedforward = config.is_feedforward(site.name)
        shape = (1, site.in_features) if self.is_feedforward else (site.out_features, 1)
        self.ia3_l = nn.Parameter(site.ones(*shape) if config.init_ia3_weights else site.normal(*shape))

    def merged(self, below: Below) -> tuple[Tensor, Tensor | None]:
        """Return the weight with its rows (and the bias) scaled, or with its columns scaled."""
        bias = below.bias
        return below.weight * self.ia3_l, bias if bias is None or self.is_feedforward else bias * self.ia3_l[:, 0]

    def forward(self, x: Tensor, below: Below) -> Tensor:
        """Return the inherited result without building the scaled weight."""
        scale = self.ia3_l.flatten().to(x.dtype)
        return below(x * scale) if self.is_feedforward else below(x) * scale
