"""LoRA on `nn.MultiheadAttention`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from tunerkit.errors import UnsupportedSiteError
from tunerkit_lora.adapter import LoraAdapter

if TYPE_CHECKING:
    from torch import Tensor

    from tunerkit.sites import Below, Site
    from tunerkit_lora.config import LoraConfig


class LoraAttention(LoraAdapter):
    """``W + s B A`` for the fused projection of query, key and value: ``A`` is r x embed, ``B`` 3 embed x r.

    The layer projects its inputs and attends in one step, so the factors are folded into the weight for each call.

    Raises:
        UnsupportedSiteError: The adapter is to train with dropout. Once folded it has no input of its own to drop from.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"attention"})

    def __init__(self, site: Site, config: LoraConfig) -> None:
        if config.lora_dropout and not config.inference_mode:
            msg = (
                f"lora_dropout={config.lora_dropout} has no meaning for the attention layer {site.name!r}: it runs "
                "with the adapter folded into its weight, so nothing can be dropped from the adapter's input alone. "
                "Give it an adapter of its own that has lora_dropout=0."
            )
            raise UnsupportedSiteError(msg)
        super().__init__(site, config)

    def forward(self, x: Tensor, below: Below) -> Tensor:
        """Return the layer's output with the folded weight."""
        return below.run(x, *self.merged(below))


class LoraOutputProjection(LoraAdapter):
    """``W + 2 s B A`` for the output projection of an attention layer.

    PEFT folds this update into the weight twice, in the forward and when merging, so its checkpoints are trained with
    twice the scale that their config says. The 2 makes them mean here what they mean there, and the other way round.
    """

    @property
    def initial_scaling(self) -> float:
        """Twice the scale that follows from rank and alpha."""
        return 2 * super().initial_scaling
