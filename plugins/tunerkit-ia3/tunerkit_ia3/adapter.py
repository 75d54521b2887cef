"""The maths of IA3."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from tunerkit.adapter import Adapter
from tunerkit.errors import UnsupportedSiteError

if TYPE_CHECKING:
    from tunerkit.sites import Below, EmbeddingSite, Site
    from tunerkit_ia3.config import IA3Config


class IA3Adapter(Adapter):
    """``l * (W x + b)``: scales the layer's outputs, or its inputs (``W (l * x) + b``) in feed-forward layers.

    From "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning" (arXiv 2205.05638).
    ``l`` is out x 1, or 1 x in for feed-forward layers, and starts at one. For a convolution it holds a number for each
    channel, and is 1 x channels x 1 ...
    """

    entries: ClassVar[tuple[str, ...]] = ("ia3_l",)
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv2d", "conv3d"})

    def __init__(self, site: Site, config: IA3Config) -> None:
        super().__init__(site, config)
        self.is_feedforward = config.is_feedforward(site.name)
        count = site.channels if self.is_feedforward else site.out_features
        shape = (1, count, *(1 for _ in site.stored.shape[2:]))
        if site.kind == "linear" and not self.is_feedforward:
            shape = count, 1
        self.ia3_l = nn.Parameter(site.ones(*shape) if config.init_ia3_weights else site.normal(*shape))

    def merged(self, below: Below) -> tuple[Tensor, Tensor | None]:
        """Return the weight with its rows (and the bias) scaled, or with its columns scaled."""
        weight, bias, scale = below.weight, below.bias, self.ia3_l.flatten()
        if self.is_feedforward:
            return weight * below.base.scale_inputs(scale), bias
        return weight * scale[:, None], None if bias is None else bias * scale

    def forward(self, x: Tensor, below: Below) -> Tensor:
        """Return the inherited result without building the scaled weight."""
        scale = (self.ia3_l.flatten() if below.base.kind == "linear" else self.ia3_l).to(x.dtype)
        return below(x * scale) if self.is_feedforward else below(x) * scale


class IA3Embedding(Adapter):
    """``l * w`` for each vector ``w`` of a table: scales what the embedding returns.

    ``l`` is width x 1 and starts at one. The inputs of an embedding are token numbers, so none can be a feed-forward
    layer.
    """

    entries: ClassVar[tuple[str, ...]] = ("ia3_l",)
    kinds: ClassVar[frozenset[str]] = frozenset({"embedding"})
    is_feedforward: bool = False

    def __init__(self, site: Site, config: IA3Config) -> None:
        super().__init__(site, config)
        if config.is_feedforward(site.name):
            msg = (
                f"The module {site.name!r} is an embedding, whose inputs are token numbers and cannot be rescaled. "
                "Leave it out of feedforward_modules, so that its outputs are."
            )
            raise UnsupportedSiteError(msg)
        shape = site.in_features, 1
        self.ia3_l = nn.Parameter(site.ones(*shape) if config.init_ia3_weights else site.normal(*shape))

    def merged(self, below: Below) -> tuple[Tensor, Tensor | None]:
        """Return the table with its columns scaled."""
        return below.weight * self.ia3_l.T, below.bias

    def forward(self, x: Tensor, below: Below) -> Tensor:
        """Return the inherited result without building the scaled table, where that is possible."""
        base: EmbeddingSite = below.base  # type: ignore[assignment]
        if base.renormalises:
            return super().forward(x, below)
        y = below(x)
        return y * self.ia3_l.flatten().to(y.dtype)
