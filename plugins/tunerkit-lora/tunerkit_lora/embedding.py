"""The maths of LoRA on an embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from tunerkit.alike import run_each
from tunerkit.errors import UnsupportedSiteError
from tunerkit_lora.base import LowRankAdapter
from tunerkit_lora.factors import starting_factors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

    from tunerkit.rows import Groups
    from tunerkit.sites import Below, EmbeddingSite, Site
    from tunerkit_lora.config import LoraConfig


class LoraEmbedding(LowRankAdapter):
    """``W + s (B A)^T`` for a table ``W`` of tokens x width.

    ``A`` is r x tokens and starts at zero, ``B`` is width x r and starts at random. Tokens cannot be dropped in part,
    so there is no dropout here, and as in PEFT there is no bias.
    """

    entries: ClassVar[tuple[str, ...]] = ("lora_embedding_A", "lora_embedding_B")
    factor_keys: ClassVar[tuple[str, str]] = ("lora_embedding_A", "lora_embedding_B")
    kinds: ClassVar[frozenset[str]] = frozenset({"embedding"})

    def __init__(self, site: EmbeddingSite, config: LoraConfig) -> None:
        if config.lora_bias:
            msg = (
                f"The module {site.name!r} is an embedding, and lora_bias=True is for linear layers and convolutions. "
                "Leave lora_bias out, or do not target it."
            )
            raise UnsupportedSiteError(msg)
        super().__init__(site, config)
        first, second = starting_factors(site, self.r, self.scaling, config)
        self.lora_embedding_A = nn.Parameter(first)
        self.lora_embedding_B = nn.Parameter(second, requires_grad=config.trains_second)

    def dropped(self, x: Tensor) -> Tensor:
        """Return the tokens themselves, which cannot be dropped in part."""
        return x

    def product(self, base: Site) -> tuple[Tensor, Tensor, float | Tensor] | None:
        """Return ``A^T``, tokens x r, ``B^T`` and ``s``."""
        del base
        return self.lora_embedding_A.T, self.lora_embedding_B.T, self.scaling

    def forward(self, x: Tensor, below: Below) -> Tensor:
        """Return the inherited result from the rows that are asked for alone, where the layer only looks them up."""
        base: EmbeddingSite = below.base  # type: ignore[assignment]
        if not base.only_looks_up:
            return super().forward(x, below)
        return self.added(below(x), x, base)

    @classmethod
    def forward_rows(cls, adapters: Sequence[Self], x: Tensor, below: Below, groups: Groups) -> Tensor:
        """Return the inherited result without stacking factors that are as long as the vocabulary."""
        return run_each(adapters, x, below, groups)  # type: ignore[no-any-return]

    def added(self, y: Tensor, x: Tensor, base: Site, gain: Tensor | None = None) -> Tensor:
        """Return an output of the layer with the update added; see `LowRankAdapter.added`."""
        second = self.lora_embedding_B if gain is None else gain[:, None] * self.lora_embedding_B
        found: Tensor = base.look_up(x, self.lora_embedding_A.T)  # type: ignore[attr-defined]
        rows = found @ second.T.to(found.dtype)
        return y + (self.scaling * rows).to(y.dtype)

    def tie(self, other: object) -> None:
        """Share the factors of another embedding with the same table; see `Adapter.tie`."""
        if not isinstance(other, LoraEmbedding):
            super().tie(other)
            return
        self.lora_embedding_A, self.lora_embedding_B = other.lora_embedding_A, other.lora_embedding_B
