"""The maths of LoRA on a linear layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from tunerkit.adapter import linear
from tunerkit.errors import AdapterStateError, ConfigError
from tunerkit.low_rank import add_low_rank, add_low_rank_rows, plain_weights
from tunerkit.sites import twin
from tunerkit_lora.base import LowRankAdapter
from tunerkit_lora.embedding import LoraEmbedding
from tunerkit_lora.factors import starting_bias, starting_factors
from tunerkit_lora.tying import Transposed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from typing_extensions import Self

    from tunerkit.adapter import Adapter
    from tunerkit.rows import Groups
    from tunerkit.sites import Below, Site
    from tunerkit_lora.config import LoraConfig

    Factor = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | Transposed


class LoraAdapter(LowRankAdapter):
    """``W + s B A``: two small factors instead of a full update.

    From "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685). ``A`` is r x in and starts at random,
    ``B`` is out x r and starts at zero, so training starts from the base model; ``s`` is alpha / r, or alpha / sqrt(r)
    with rank-stabilised scaling (arXiv 2312.03732). With `lora_bias` ``B`` has a bias ``c``, and ``s c`` is added too.
    """

    lora_A: Factor  # noqa: N815 - the name in a checkpoint
    lora_B: Factor  # noqa: N815 - the same
    entries: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    factor_keys: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")

    def __init__(self, site: Site, config: LoraConfig) -> None:
        super().__init__(site, config)
        first, second = self.start(site, config)
        own = self._modules  # not by attributes, which would cost as much as the factors
        own["lora_A"], own["lora_B"] = self.make_layers(site, first, second, starting_bias(site, self.r, config))
        if not config.trains_second:
            self.lora_B.requires_grad_(requires_grad=False)

    def start(self, site: Site, config: LoraConfig) -> tuple[Tensor, Tensor]:
        """Return the factors that a new adapter starts from; see `starting_factors`."""
        return starting_factors(site, self.r, self.scaling, config)

    @staticmethod
    def make_layers(site: Site, first: Tensor, second: Tensor, bias: Tensor | None) -> tuple[Factor, Factor]:
        """Return the layers that hold the factors."""
        del site
        return linear(first), linear(second, bias)

    def pair(self) -> tuple[nn.Module, nn.Module]:
        """Return the layers that are run one after the other."""
        return self.lora_A, self.lora_B

    def product(self, base: Site) -> tuple[Tensor, Tensor, float | Tensor] | None:
        """Return ``B``, ``A`` and ``s``."""
        del base
        first, second = self.factors
        return second, first, self.scaling

    def delta_bias(self, base: Site) -> Tensor | None:
        """Return ``s c``, or None."""
        del base
        bias = self.factor_bias
        return None if bias is None else self.scaling * bias

    @property
    def factor_bias(self) -> Tensor | None:
        """The bias of ``B``, or None."""
        return self.lora_B.bias

    def forward(self, x: Tensor, below: Below) -> Tensor:
        """Return the inherited result without building the full-size delta; only this way has dropout."""
        return add_low_rank(below(x), self.dropped(x), self.lora_A, self.lora_B, self.scaling)

    def added(self, y: Tensor, x: Tensor, base: Site, gain: Tensor | None = None) -> Tensor:
        """Return an output of the layer with the update added; see `LowRankAdapter.added`."""
        del base
        first, second = self.pair()
        if gain is not None:
            weight: Tensor = second.weight  # type: ignore[assignment]
            grown = gain.reshape(-1, *(1 for _ in weight.shape[1:])) * weight
            second = twin(second, weight=grown.t() if self.tied else grown)
        return add_low_rank(y, x, first, second, self.scaling)

    @classmethod
    def forward_rows(cls, adapters: Sequence[Self], x: Tensor, below: Below, groups: Groups) -> Tensor:
        """Return the inherited result with the small factors of all adapters in two products for the whole batch."""
        dropouts = {adapter.lora_dropout if adapter.training else 0.0 for adapter in adapters}
        downs = plain_weights([adapter.lora_A for adapter in adapters])
        ups = plain_weights([adapter.lora_B for adapter in adapters])
        if len(dropouts) > 1 or downs is None or ups is None:
            return super().forward_rows(adapters, x, below, groups)
        rate = dropouts.pop()
        dropped = F.dropout(x, rate) if rate else x
        scalings = [adapter.scaling for adapter in adapters]
        return add_low_rank_rows(below(x), dropped, downs, ups, scalings, groups)

    # Tied weights: one pair of factors for an embedding and for the layer that holds its table too

    @property
    def tied(self) -> bool:
        """Whether the factors are those of an embedding's adapter."""
        return isinstance(self.lora_A, Transposed)

    def tie(self, other: object) -> None:
        """Share the factors of an embedding's adapter: its ``B^T`` as ``A`` and its ``A^T`` as ``B``.

        As in PEFT both start as this adapter does, so that an untrained ``A`` is not larger than on a linear layer.

        Raises:
            UnsupportedSiteError: The other is no embedding's adapter.
            ConfigError: The start is one that belongs to a single layer, or ranks or scales differ.
        """
        if not isinstance(other, LoraEmbedding):
            super().tie(other)
            return
        if self.has_own_start:
            msg = (
                "ensure_weight_tying=True needs factors that start the same on both of two tied layers: set "
                "init_lora_weights to True, False or 'gaussian'."
            )
            raise ConfigError(msg)
        ours, theirs = (self.r, self.scaling), (other.r, other.scaling)
        if ours != theirs:
            msg = (
                f"rank_pattern or alpha_pattern give two tied layers other ranks or scales: {theirs} and {ours} "
                "(ensure_weight_tying=True). Give both the same."
            )
            raise ConfigError(msg)
        with torch.no_grad():
            other.lora_embedding_B.copy_(self.lora_A.weight.t())
            other.lora_embedding_A.copy_(self.lora_B.weight.t())
        self.lora_A, self.lora_B = Transposed(other.lora_embedding_B), Transposed(other.lora_embedding_A)

    def take(self, other: Adapter) -> None:
        """Take over another adapter; see `Adapter.take`. Where the factors are tied, it is brought to their form."""
        if self.tied and isinstance(other, LoraAdapter) and not other.tied:
            pair = (nn.Parameter(factor.weight.detach().t()) for factor in (other.lora_A, other.lora_B))
            other.lora_A, other.lora_B = (Transposed(factor) for factor in pair)
        super().take(other)

    def _hold(self, rank: int) -> None:
        if self.tied and rank != self.room:
            msg = (
                f"The factors of an adapter are tied to an embedding's (ensure_weight_tying=True), so their rank stays "
                f"{self.room} and cannot become {rank}. Load the other as another adapter."
            )
            raise AdapterStateError(msg)
        super()._hold(rank)

    def to_checkpoint(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors as those of an adapter by itself; see `Adapter.to_checkpoint`."""
        return self._turned(tensors) if self.tied else super().to_checkpoint(tensors)

    def from_checkpoint(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a checkpoint's tensors in the form in which this adapter holds them."""
        return self._turned(tensors) if self.tied else super().from_checkpoint(tensors)

    def _turned(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**tensors, **{key: tensors[key].t() for key in self.factor_keys}}
