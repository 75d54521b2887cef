"""`nn.Embedding`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from tunerkit.sites.base import Site, unfit_weight

if TYPE_CHECKING:
    from torch import nn


class EmbeddingSite(Site):
    """A table of vectors, weight tokens x width.

    Its rows are what a linear layer's outputs are: `out_features` counts them.
    """

    kind: ClassVar[str] = "embedding"
    __slots__ = ()

    @classmethod
    def takes(cls, module: nn.Module) -> str | None:
        """Return why this very layer cannot be adapted, or None."""
        return unfit_weight(module)
