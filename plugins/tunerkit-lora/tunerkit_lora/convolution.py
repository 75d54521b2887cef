"""The maths of LoRA on a convolution."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from tunerkit.errors import MergeError, UnsupportedSiteError
from tunerkit_lora.adapter import LoraAdapter

if TYPE_CHECKING:
    from torch import Tensor

    from tunerkit.sites import ConvolutionSite, Site
    from tunerkit_lora.adapter import Factor
    from tunerkit_lora.config import LoraConfig

GROUPED = (
    "it stands on a convolution with groups, and its first factor mixes all channels, which kernels with groups cannot"
)


class LoraConvolution(LoraAdapter):
    """``W + s B A`` on kernels: a convolution with r kernels like the layer's, and one with kernels of size one.

    ``A`` steps over the input as the layer does and has r kernels over all its channels; ``B`` has the layer's groups.
    If there are several, ``A`` joins channels that ``W`` keeps apart, so ``B A`` is no change of ``W``: it cannot be
    merged, and the rank must be a multiple of the number of groups.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"conv1d", "conv2d", "conv3d"})

    def __init__(self, site: ConvolutionSite, config: LoraConfig) -> None:
        rank, groups = config.rank_for(site.settings_name), site.groups
        if rank % groups:
            near = groups * max(1, round(rank / groups))
            msg = (
                f"The convolution {site.name!r} has groups={groups}, and the rank there, {rank}, is not a multiple of "
                f"that. Set another, with rank_pattern={{{site.settings_name!r}: {near}}} for this layer alone, or do "
                "not target it."
            )
            raise UnsupportedSiteError(msg)
        super().__init__(site, config)
        self.unfoldable = GROUPED if groups > 1 else None
        self.rank_groups = groups

    @staticmethod
    def make_layers(site: Any, first: Tensor, second: Tensor, bias: Tensor | None) -> tuple[Factor, Factor]:
        """Return the convolutions that hold the factors."""
        return site.convolution(first), site.pointwise(second, bias)

    def product(self, base: Site) -> tuple[Tensor, Tensor, float | Tensor] | None:
        """Return ``B``, ``A`` for flattened kernels, r x (in * size of the kernel), and ``s``.

        Raises:
            MergeError: The layer has groups.
        """
        if self.unfoldable is not None:
            msg = f"The adapter on {base.name!r} adds nothing that fits its weight: {self.unfoldable}."
            raise MergeError(msg)
        return super().product(base)

    def has_effect(self, base: Site) -> bool:
        """Return whether this adapter changes the layer; see `Adapter.has_effect`."""
        if self.unfoldable is None:
            return super().has_effect(base)
        return any(bool(tensor.any()) for tensor in self.lora_B.parameters())

    def along_outputs(self, vector: Tensor) -> Tensor:
        """Return a vector with a number for each channel in a shape that broadcasts to the layer's output."""
        return vector.reshape(-1, *(1 for _ in self.lora_A.weight.shape[2:]))
