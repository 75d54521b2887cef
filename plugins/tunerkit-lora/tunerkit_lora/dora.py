"""The maths of DoRA, on every kind of layer that LoRA adapts."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from tunerkit.errors import UnsupportedSiteError
from tunerkit_lora.adapter import LoraAdapter
from tunerkit_lora.anchored import AnchoredLora
from tunerkit_lora.base import LowRankAdapter
from tunerkit_lora.convolution import LoraConvolution
from tunerkit_lora.embedding import LoraEmbedding
from tunerkit_lora.loftq import LoftqLora, with_weight

if TYPE_CHECKING:
    from tunerkit.sites import Below, Site
    from tunerkit_lora.config import LoraConfig

_KEY = "lora_magnitude_vector"


def norms(weight: Tensor, first: Tensor, second: Tensor, scaling: float) -> Tensor:
    """Return the length of each row of ``W + s B A`` without building ``B A``.

    It is the root of ``|W|^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>``, taken row by row. No gradient flows through it.

    Args:
        weight: ``W``, out x in.
        first: ``A``, r x in.
        second: ``B``, out x r.
        scaling: ``s``.

    Returns:
        A vector of size out, in float32 if the weight is of lower precision. A row that is zero, or shorter than the
        terms' rounding can tell, counts as that long, so that nothing is divided by zero.
    """
    with torch.no_grad():
        dtype = torch.promote_types(weight.dtype, torch.float32)
        plain = torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square()
        crossed = (weight @ first.to(weight.dtype).T).to(dtype)
        first, second = first.to(dtype), second.to(dtype)
        squares = plain + ((2 * scaling * crossed + scaling**2 * (second @ (first @ first.T))) * second).sum(1)
        limits = torch.finfo(dtype)
        lengths: Tensor = squares.maximum(limits.eps * plain + limits.tiny).sqrt()
        return lengths


class Magnitude(nn.Module):
    """The length of each row, learned: a module, for in PEFT it is `lora_magnitude_vector.default.weight`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class DoraAdapter(LowRankAdapter):
    """``m (W + s B A) / |W + s B A|``: the length and the direction of each row of the weight are learned apart.

    From "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv 2402.09353). The vector ``m`` starts at the rows' lengths.
    ``|W + s B A|`` is taken row by row from the bare layer's ``W`` and counts as constant in the gradient (section 4.3
    of the paper). What stands below on the layer is scaled along: with ``g = m / |W + s B A|`` and the bias ``b`` the
    output is ``g (below(x) - b) + b + g s B A x``. The rows are those of the map from inputs to outputs, so on an
    embedding they are the columns of its table.
    """

    commutes: bool = False
    use_dora: bool = True

    def __init__(self, site: Site, config: LoraConfig) -> None:
        super().__init__(site, config)
        if self.unfoldable is not None:
            msg = (
                f"use_dora=True needs the length of the merged weight's rows, and on {site.name!r} there is none: "
                f"{self.unfoldable}. Leave use_dora out, or do not target it."
            )
            raise UnsupportedSiteError(msg)
        self.lora_magnitude_vector = Magnitude(self.starting_magnitude(site))

    def starting_magnitude(self, base: Site) -> Tensor:
        """Return ``m`` at the start: the lengths of the rows of ``W + s B A``, in the shape in which PEFT stores it."""
        first, second = self.factors
        lengths = base.empty(len(second)) if first.is_meta else norms(self.rows(base), first, second, self.scaling)
        return self.shaped(lengths.to(base.dtype))

    def restart(self, base: Site, first: Tensor, second: Tensor) -> None:
        """Start anew from other factors, with the magnitudes that go with them; see `LowRankAdapter.restart`."""
        super().restart(base, first, second)
        self.lora_magnitude_vector.weight.copy_(self.starting_magnitude(base))

    def rows(self, base: Site) -> Tensor:
        """Return the weight as the matrix from inputs to outputs."""
        return base.weight

    def shaped(self, lengths: Tensor) -> Tensor:
        """Return a vector of lengths in the shape in which PEFT stores it."""
        return lengths

    def gain(self, base: Site) -> Tensor:
        """Return ``g``, the factor by which each output grows, of size out."""
        lengths = norms(self.rows(base), *self.factors, self.scaling)
        return self.lora_magnitude_vector.weight.flatten() / lengths

    def delta(self, base: Site) -> Tensor:
        """Return what is added to the bare weight: ``g (W + s B A) - W``."""
        weight = base.weight
        return self.spread(self.gain(base), weight) * (weight + super().delta(base)) - weight

    def merged(self, below: Below) -> tuple[Tensor, Tensor | None]:
        """Return ``g (W + s B A)`` for the weight below, and its bias, of which only what was added there grows."""
        base, weight, bias = below.base, below.weight, below.bias
        gain = self.gain(base)
        if bias is not None and bias is not base.bias:
            plain = torch.zeros_like(bias) if base.bias is None else base.bias
            bias = plain + gain * (bias - plain)
        return self.spread(gain, weight) * (weight + super().delta(base)), bias

    def spread(self, gain: Tensor, weight: Tensor) -> Tensor:
        """Return ``g`` as what the weight of the layer is multiplied with."""
        del weight
        return gain[:, None]

    def forward(self, x: Tensor, below: Below) -> Tensor:
        """Return the inherited result without building a matrix of the weight's size; only this way has dropout."""
        base = below.base
        y, dropped, gain = below(x), self.dropped(x), self.gain(base)
        # A layer may keep its bias in another dtype than its outputs, as quantised ones do.
        plain = y if base.bias is None else y - self.along_outputs(base.bias.to(y.dtype))
        if dropped is not x:
            # As in PEFT: what the bare weight makes of the input counts undropped once, and grows dropped.
            plain = below.run(dropped, base.weight, None)
        y = torch.addcmul(y, self.along_outputs(gain - 1).to(y.dtype), plain)
        return self.added(y, dropped, base, gain)

    def to_checkpoint(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors with the magnitude named as in PEFT's files, without `.weight`."""
        tensors = super().to_checkpoint(tensors)
        return {_KEY if key == f"{_KEY}.weight" else key: tensor for key, tensor in tensors.items()}

    def from_checkpoint(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a checkpoint's tensors with the magnitude named as in the model."""
        tensors = super().from_checkpoint(tensors)
        return {f"{_KEY}.weight" if key == _KEY else key: tensor for key, tensor in tensors.items()}


class DoraLinear(DoraAdapter, LoraAdapter):
    """DoRA on a linear layer."""

    entries: ClassVar[tuple[str, ...]] = (*LoraAdapter.entries, _KEY)


class AnchoredDora(DoraAdapter, AnchoredLora):
    """DoRA on a linear layer, with a start that is taken off again."""

    entries: ClassVar[tuple[str, ...]] = (*AnchoredLora.entries, _KEY)


class LoftqDora(LoftqLora, DoraLinear):
    """DoRA on a linear layer, on a quantised weight in place of the base's."""

    entries: ClassVar[tuple[str, ...]] = (*LoftqLora.entries, _KEY)

    def starting_magnitude(self, base: Site) -> Tensor:
        """Return the inherited result on the quantised weight."""
        return super().starting_magnitude(with_weight(base, self.lora_start_weight))


class DoraConvolution(DoraAdapter, LoraConvolution):
    """DoRA on a convolution."""

    entries: ClassVar[tuple[str, ...]] = (*LoraConvolution.entries, _KEY)

    def shaped(self, lengths: Tensor) -> Tensor:
        """Return a vector of lengths in the shape in which PEFT stores it: 1 x out x 1 ..."""
        return self.along_outputs(lengths)[None]


class DoraEmbedding(DoraAdapter, LoraEmbedding):
    """DoRA on an embedding."""

    entries: ClassVar[tuple[str, ...]] = (*LoraEmbedding.entries, _KEY)

    def rows(self, base: Site) -> Tensor:
        """Return the table as the matrix from tokens to vectors, width x tokens."""
        return base.weight.T

    def spread(self, gain: Tensor, weight: Tensor) -> Tensor:
        """Return ``g`` as what the table is multiplied with."""
        del weight
        return gain

    def forward(self, x: Tensor, below: Below) -> Tensor:
        """Return the inherited result; a layer that does more than look up runs with the merged table."""
        if not below.base.only_looks_up:  # type: ignore[attr-defined]
            return below.run(x, *self.merged(below))
        return super().forward(x, below)
