"""The maths of the method."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import nn

from tunerkit.adapter import Adapter

if TYPE_CHECKING:
    from torch import Tensor

    from tunerkit.sites import Below, Site
    from tunerkit_ssf.config import SSFConfig


class SSFAdapter(Adapter):
    """``diag(g) W`` and ``g * b + d``: scales the outputs of a layer, and shifts them.

    From "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning" (arXiv 2210.08823). ``g`` and
    ``d`` are of size out and start at one and at zero, so training starts from the base model.
    """

    entries: ClassVar[tuple[str, ...]] = ("ssf_scale", "ssf_shift")

    def __init__(self, site: Site, config: SSFConfig) -> None:
        super().__init__(site, config)
        self.ssf_scale = nn.Parameter(site.ones(site.out_features))
        self.ssf_shift = nn.Parameter(site.zeros(site.out_features))

    def merged(self, below: Below) -> tuple[Tensor, Tensor]:
        """Return the weight with its rows scaled, and the bias scaled and shifted: there always is one."""
        scale, shift, bias = self.ssf_scale, self.ssf_shift, below.bias
        return scale[:, None] * below.weight, shift if bias is None else scale * bias + shift

    def forward(self, x: Tensor, below: Below) -> Tensor:
        """Return the inherited result without building the scaled weight."""
        y = below(x)
        return self.ssf_scale.to(y.dtype) * y + self.ssf_shift.to(y.dtype)
