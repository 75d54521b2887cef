"""LoRA that starts from factors of the weight itself, which are taken off again."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from tunerkit.errors import CheckpointError
from tunerkit.sites import twin
from tunerkit_lora.adapter import LoraAdapter

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunerkit.adapter import Adapter
    from tunerkit.sites import Below, Site
    from tunerkit_lora.config import LoraConfig

_ROUNDING = 2e-2
"""By how much two starts may differ of which one was rounded to bfloat16."""


class AnchoredLora(LoraAdapter):
    """``W + s (B A - B0 A0)``: training starts from the weight's own directions, ``B0 A0``, and from the base model.

    In PEFT the start is taken off the base weight for good. Here the base stays as it is, and the adapter keeps the
    start: it is not trained and not saved but derived from the weight again when a checkpoint is loaded, as in PEFT.
    As one product it is ``s [B, -B0] [A; A0]``, a plain adapter of twice the rank.
    """

    entries: ClassVar[tuple[str, ...]] = (*LoraAdapter.entries, "lora_start_A", "lora_start_B")

    def __init__(self, site: Site, config: LoraConfig) -> None:
        super().__init__(site, config)
        self.lora_start_A: Tensor
        self.lora_start_B: Tensor
        self.register_buffer("lora_start_A", self.lora_A.weight.detach().clone(), persistent=False)
        self.register_buffer("lora_start_B", self.lora_B.weight.detach().clone(), persistent=False)

    def forward(self, x: Tensor, below: Below) -> Tensor:
        """Return the inherited result from both products at once; dropout acts on the input of both."""
        return self.added(below(x), self.dropped(x), below.base)

    @property
    def room(self) -> int:
        """The rank that the factors have room for; of a weight of a lower rank than `r` they have that many."""
        return self.r + len(self.lora_A.weight) - len(self.lora_start_A)

    def take(self, other: Adapter) -> None:
        """Take over another adapter, and what it started from; see `Adapter.take`."""
        super().take(other)
        if isinstance(other, AnchoredLora):
            self.lora_start_A, self.lora_start_B = other.lora_start_A, other.lora_start_B

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """The matrices of the whole product, ``[A; A0]`` and ``[B, -B0]``; not the very tensors."""
        first = torch.cat([self.lora_A.weight, self.lora_start_A])
        return first, torch.cat([self.lora_B.weight, -self.lora_start_B], 1)

    def pair(self) -> tuple[nn.Module, nn.Module]:
        """Return the layers of the whole product."""
        first, second = self.factors
        return twin(self.lora_A, weight=first), twin(self.lora_B, weight=second)

    def standalone(self, tensors: dict[str, Tensor], initial: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Return the factors of the whole product; see `LowRankAdapter.standalone`.

        Raises:
            CheckpointError: The initial factors are not those that this adapter started from.
        """
        start = {"lora_A.weight": self.lora_start_A, "lora_B.weight": self.lora_start_B}
        if initial is not None:
            # Compared as products: a decomposition elsewhere may have turned the signs of both factors round.
            ours, theirs = (each["lora_B.weight"].float() @ each["lora_A.weight"].float() for each in (start, initial))
            if float((ours - theirs.to(ours)).norm()) > _ROUNDING * float(ours.norm()):
                msg = (
                    "The initial adapter is not what this adapter started from. Give the folder of this very adapter "
                    "as it was saved before training."
                )
                raise CheckpointError(msg)
        return super().standalone(tensors, start)
