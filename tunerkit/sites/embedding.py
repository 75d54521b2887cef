"""`nn.Embedding`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from tunerkit.sites.base import Site, unfit_weight

if TYPE_CHECKING:
    from collections.abc import Mapping


class EmbeddingSite(Site):
    """A table of vectors, weight tokens x width.

    Its rows are what a linear layer's outputs are: `out_features` counts them.
    """

    kind: ClassVar[str] = "embedding"
    module: nn.Embedding
    __slots__ = ()

    @classmethod
    def takes(cls, module: nn.Module) -> str | None:
        """Return why this very layer cannot be adapted, or None."""
        return unfit_weight(module)

    def with_parameters(self, tensors: Mapping[str, Tensor | None]) -> Site:
        """Return this site with another table, for one call; what the table is made of gets no sparse gradient."""
        other = super().with_parameters(tensors)
        other.module.__dict__["sparse"] = False
        return other

    @property
    def renormalises(self) -> bool:
        """Whether the layer shortens the vectors it looks up (`max_norm`), so that it is not linear in its table."""
        return self.module.max_norm is not None

    @property
    def only_looks_up(self) -> bool:
        """Whether the layer returns rows of its table as they are, or times one number: see `look_up`."""
        module = self.module
        return not self.renormalises and (
            type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
        )

    def look_up(self, tokens: Tensor, table: Tensor) -> Tensor:
        """Return rows of another table in the way in which a layer that `only_looks_up` returns rows of its own.

        Args:
            tokens: The layer's input: whole numbers, in any shape.
            table: Another table, tokens x any width.

        Returns:
            A row for each token, with the layer's padding and scale, of the dtype of the table. The table's gradient is
            never sparse.
        """
        module = self.module
        rows = F.embedding(
            tokens,
            table,
            padding_idx=module.padding_idx,
            scale_grad_by_freq=module.scale_grad_by_freq,
        )
        if type(module).forward is nn.Embedding.forward:
            return rows
        # Transformers' scaled embeddings; the scale is a number, or a tensor of one.
        scale: float | Tensor = module.embed_scale  # type: ignore[assignment]
        return rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)
